//! An exposition of metrics, and what parsers that are not the service's own read in it.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use http::Method;
use http::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue};
use serde::Deserialize;

use super::Service;

/// What Prometheus 3 asks for.
pub(crate) const PROMETHEUS_ACCEPTS: &str = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
     application/openmetrics-text;version=0.0.1;q=0.4,\
     text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,\
     */*;q=0.1";

/// What `/metrics` answered.
pub(crate) struct Exposition {
    pub(crate) body: String,
    pub(crate) content_type: String,
    format: &'static str,
}

/// A metric with its samples.
#[derive(Debug, Deserialize)]
pub(crate) struct Family {
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) unit: String,
    pub(crate) help: String,
    pub(crate) samples: Vec<Sample>,
}

/// One sample.
#[derive(Debug, Deserialize)]
pub(crate) struct Sample {
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) value: String,
    pub(crate) exemplar: Option<Exemplar>,
}

/// An observation that a bucket points to.
#[derive(Debug, Deserialize)]
pub(crate) struct Exemplar {
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) value: f64,
    pub(crate) timestamp: f64,
}

impl Exposition {
    /// In the format that a person gets.
    pub(crate) async fn text(service: &Service) -> Self {
        Self::of(service, "*/*", "text").await
    }

    /// In the format that Prometheus gets.
    pub(crate) async fn openmetrics(service: &Service) -> Self {
        Self::of(service, PROMETHEUS_ACCEPTS, "openmetrics").await
    }

    async fn of(service: &Service, accept: &'static str, format: &'static str) -> Self {
        let accept = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(accept))]);
        let response = service.ask(Method::GET, "/metrics", accept).await;
        Self {
            content_type: response.header(CONTENT_TYPE.as_str()).to_owned(),
            body: response.body,
            format,
        }
    }

    /// The text with families and their series in the order of names: the service has them in any
    /// order. The samples of a series keep theirs.
    pub(crate) fn sorted(&self) -> String {
        let lines: Vec<_> = self.body.lines().collect();
        let is_in_family =
            |before: &&str, line: &&str| before.starts_with('#') || !line.starts_with('#');
        let mut families: Vec<_> = lines.chunk_by(is_in_family).map(<[&str]>::to_vec).collect();
        for family in &mut families {
            family.sort_by_key(|line| (line.is_empty(), labels(line)));
        }
        // The last line of OpenMetrics has no name.
        families.sort_by_key(|family| family[0].split(' ').nth(2).unwrap_or("~").to_owned());
        families.concat().join("\n") + "\n"
    }

    /// As the formats' reference parser reads it, in the order of names.
    pub(crate) fn families(&self) -> Vec<Family> {
        let script = ["-c", include_str!("parse.py"), self.format];
        let parsed = piped(Command::new(python()).args(script), &self.body);
        let errors = String::from_utf8_lossy(&parsed.stderr);
        assert!(parsed.status.success(), "{errors} in {}", self.body);
        let mut families: Vec<Family> = serde_json::from_slice(&parsed.stdout).expect("families");
        families.sort_by(|one, other| one.name.cmp(&other.name));
        families
    }

    /// What `promtool check metrics` has against it.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let mut promtool = Command::new("promtool");
        let checked = piped(promtool.args(["check", "metrics"]), &self.body);
        let said = [checked.stdout, checked.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        said.lines().map(str::to_owned).collect()
    }
}

/// The labels of a sample, without the bound of a bucket. A comment has none.
fn labels(line: &str) -> String {
    let labels = line.split_once('{').filter(|_| !line.starts_with('#'));
    let labels = labels.and_then(|(_, rest)| rest.split_once('}'));
    let labels = labels.map_or("", |(labels, _value)| labels).split(',');
    let labels: Vec<_> = labels.filter(|label| !label.starts_with("le=")).collect();
    labels.join(",")
}

/// A Python that has the reference parser.
fn python() -> &'static str {
    let has_parser = |python: &&str| {
        let mut import = Command::new(python);
        let import = import.args(["-c", "import prometheus_client"]);
        let imported = import.stderr(Stdio::null()).status();
        imported.is_ok_and(|status| status.success())
    };
    let python = ["python3", "/usr/bin/python3"].into_iter().find(has_parser);
    python.expect("a Python with prometheus_client: `make setup` installs it")
}

fn piped(command: &mut Command, input: &str) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}: `make setup` installs it"));
    let mut stdin = child.stdin.take().expect("a pipe");
    let input = input.to_owned();
    let writing = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().expect("its output");
    writing.join().expect("no panic").expect("it reads all");
    output
}
