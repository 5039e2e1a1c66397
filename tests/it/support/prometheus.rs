//! A Prometheus with the project's own configuration and rules, made to look more often and at
//! other addresses. It knows nothing of what is scraped.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use lab::ports::free_address;
use serde_json::Value;
use tempfile::TempDir;
use url::Url;

use super::{SOON, eventually};

/// Where the configuration, the rules and the dashboards are.
pub(crate) const OBSERVABILITY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/observability");

/// How often it scrapes and evaluates: a test does not wait for seconds.
const OFTEN: &str = "200ms";

/// How it finds the replicas in Compose.
const DISCOVERY: &str = "dns_sd_configs:
      - names: [web]
        type: A
        port: 5000
        refresh_interval: 5s
";

/// A running Prometheus. Dropping it kills it.
pub(crate) struct Prometheus {
    address: SocketAddr,
    client: reqwest::Client,
    child: Child,
    folder: TempDir,
}

impl Prometheus {
    /// Starts one that scrapes these as the job `visitas`, and waits until it is ready.
    pub(crate) async fn start(targets: &[SocketAddr]) -> Self {
        let address = free_address().expect("a free port");
        let folder = tempfile::tempdir().expect("a folder");
        let configuration = folder.path().join("prometheus.yml");
        std::fs::write(&configuration, configured(address, targets)).expect("a configuration");
        copy_rules(&folder.path().join("rules"));
        let log = File::create(folder.path().join("log")).expect("a log");
        let child = installed("prometheus")
            .arg(format!("--config.file={}", configuration.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                folder.path().join("data").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .arg("--enable-feature=exemplar-storage")
            .stderr(log)
            .spawn()
            .expect("prometheus starts");
        let mut prometheus = Self {
            address,
            client: super::service::client(),
            child,
            folder,
        };
        prometheus.until_ready().await;
        prometheus
    }

    async fn until_ready(&mut self) {
        let url = format!("http://{}/-/ready", self.address);
        eventually("Prometheus is ready", 2 * SOON, async || {
            let ended = self.child.try_wait().expect("its status");
            assert!(ended.is_none(), "it ended: {}", self.log());
            let response = self.client.get(&url).send().await;
            response.is_ok_and(|response| response.status().is_success())
        })
        .await;
    }

    /// What its HTTP API responds to `path` beneath `/api/v1/`, a failure included.
    pub(crate) async fn api(&self, path: &str, parameters: &[(&str, &str)]) -> Value {
        let url = format!("http://{}/api/v1/{path}", self.address);
        let url = Url::parse_with_params(&url, parameters).expect("an address");
        let response = self.client.get(url).send().await.expect("a response");
        let body = response.text().await.expect("a body");
        serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error} in {body}"))
    }

    /// The values that an expression has now, one a series.
    ///
    /// # Errors
    ///
    /// What Prometheus has against the expression.
    pub(crate) async fn query(&self, expression: &str) -> Result<Vec<f64>, String> {
        let response = self.api("query", &[("query", expression)]).await;
        if response["status"] != "success" {
            return Err(response["error"].as_str().unwrap_or_default().to_owned());
        }
        let series = response["data"]["result"].as_array().expect("a vector");
        let value = |series: &Value| series["value"][1].as_str().expect("a sample").parse();
        Ok(series
            .iter()
            .map(|series| value(series).expect("a number"))
            .collect())
    }

    /// The rules that it keeps, as it says them itself.
    pub(crate) async fn rules(&self) -> Vec<Value> {
        let response = self.api("rules", &[]).await;
        let groups = response["data"]["groups"].as_array().expect("groups");
        groups
            .iter()
            .flat_map(|group| group["rules"].as_array().expect("rules").clone())
            .collect()
    }

    /// What it has logged.
    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A program of Debian's package `prometheus`, which is there once `make test` has set up.
pub(crate) fn installed(program: &str) -> Command {
    installed_by("prometheus", program)
}

/// A program of another package that `make test` sets up.
pub(crate) fn installed_by(package: &str, program: &str) -> Command {
    let found = Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(
        found.is_ok_and(|status| status.success()),
        "{program} was not found; `devstack/install.sh {program}={package}` installs it"
    );
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// The folder of the rules.
pub(crate) fn rules() -> PathBuf {
    PathBuf::from(OBSERVABILITY).join("rules")
}

/// Copies the rules; a group with an interval of its own is evaluated as often as the others.
fn copy_rules(folder: &Path) {
    std::fs::create_dir(folder).expect("a folder");
    for entry in std::fs::read_dir(rules()).expect("the rules") {
        let file = entry.expect("a file").path();
        let text = std::fs::read_to_string(&file).expect("rules");
        let lines = text
            .lines()
            .map(|line| match line.split_once("interval: ") {
                Some((indent, _)) if indent.trim().is_empty() => {
                    format!("{indent}interval: {OFTEN}\n")
                }
                _ => format!("{line}\n"),
            });
        let copy = folder.join(file.file_name().expect("a name"));
        std::fs::write(copy, lines.collect::<String>()).expect("a copy");
    }
}

/// The project's own configuration for Prometheus, but for how often it looks, and where.
fn configured(address: SocketAddr, targets: &[SocketAddr]) -> String {
    let text = std::fs::read_to_string(PathBuf::from(OBSERVABILITY).join("prometheus.yml"));
    let targets: Vec<_> = targets
        .iter()
        .map(|target| format!("\"{target}\""))
        .collect();
    let mut text = text.expect("a configuration");
    for (own, instead) in [
        ("scrape_interval: 5s", format!("scrape_interval: {OFTEN}")),
        ("scrape_timeout: 3s", format!("scrape_timeout: {OFTEN}")),
        (
            "evaluation_interval: 5s",
            format!("evaluation_interval: {OFTEN}"),
        ),
        (
            DISCOVERY,
            format!(
                "static_configs: [{{ targets: [{}] }}]\n",
                targets.join(", ")
            ),
        ),
        ("\"localhost:9090\"", format!("\"{address}\"")),
    ] {
        assert!(text.contains(own), "{own} in {text}");
        text = text.replace(own, &instead);
    }
    text
}
