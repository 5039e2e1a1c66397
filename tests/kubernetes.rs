//! The manifests in `deploy/kubernetes` agree with the files that they repeat something of. Must not
//! know a cluster.
//!
//! `tests/e2e-kubernetes.sh` applies the manifests.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use expect_test::expect_file;

/// The alert that has no place in a cluster: there an autoscaler removes replicas all the time, and
/// the Deployment replaces those that end.
const AUTOSCALED: &str = "VisitasReplicasMissing";

/// `UPDATE_EXPECT=1 make test T=rules_are_those` writes the manifest.
#[test]
fn rules_are_those_of_prometheus() {
    let mut manifest = "\
# A test writes this file from observability/rules: `UPDATE_EXPECT=1 make test T=rules_are_those`.
"
    .to_owned();
    for file in files("observability/rules") {
        let name = file.file_stem().expect("a name").to_string_lossy();
        write!(
            manifest,
            "---\napiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  \
             name: visitas-{name}\nspec:\n"
        )
        .expect("writing to a string succeeds");
        for line in without(AUTOSCALED, &fs::read_to_string(&file).expect("rules")) {
            let indent = if line.is_empty() { "" } else { "  " };
            writeln!(manifest, "{indent}{line}").expect("writing to a string succeeds");
        }
    }
    expect_file!["../deploy/kubernetes/observed/rules.yaml"].assert_eq(&manifest);
}

/// The lines of rules without this alert and the comment before it.
fn without<'rules>(alert: &str, rules: &'rules str) -> Vec<&'rules str> {
    let (paragraphs, mut left) = (rules.split("\n\n"), Vec::new());
    for paragraph in paragraphs.filter(|paragraph| !paragraph.contains(alert)) {
        left.extend(paragraph.lines());
        left.push("");
    }
    left.pop();
    left
}

#[test]
fn every_dashboard_becomes_a_config_map() {
    let kustomization = read("observability/kustomization.yaml");
    let dashboards = files("observability/grafana/dashboards");
    assert!(dashboards.len() > 1, "{dashboards:?}");
    for dashboard in &dashboards {
        let name = dashboard.file_name().expect("a name").to_string_lossy();
        let entry = format!("files: [grafana/dashboards/{name}]");
        assert!(kustomization.contains(&entry), "{entry}");
    }
    let entries = kustomization.matches("files: [").count();
    assert_eq!(entries, dashboards.len());
}

#[test]
fn monitor_scrapes_as_prometheus_of_compose_does() {
    let prometheus = read("observability/prometheus.yml");
    let monitor = read("deploy/kubernetes/observed/monitor.yaml");
    for (ours, theirs) in [
        ("scrape_interval: ", "interval: "),
        ("scrape_timeout: ", "scrapeTimeout: "),
        ("sample_limit: ", "sampleLimit: "),
    ] {
        assert_eq!(value(&prometheus, ours), value(&monitor, theirs), "{ours}");
    }
    let port = value(&monitor, "- { name: metrics, port: ");
    let port = port.split(',').next().expect("a number");
    let settings = read("deploy/kubernetes/base/web.env");
    let address = value(&settings, "METRICS_ADDR=");
    assert!(address.ends_with(&format!(":{port}")), "{address}");
}

/// The program ignores a variable that it does not know.
#[test]
fn variables_are_settings_of_the_program() {
    let settings = read("docs/settings.md");
    let listed = |variable: &str| settings.contains(&format!("\n| `{variable}` | "));
    let production = read("deploy/kubernetes/production/kustomization.yaml");
    let literals = production
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- "))
        .filter(|line| line.contains('=') && !line.contains(' '));
    let base = read("deploy/kubernetes/base/web.env");
    let variables: BTreeSet<_> = base
        .lines()
        .filter(|line| !line.starts_with('#'))
        .chain(literals)
        .filter_map(|line| Some(line.split_once('=')?.0))
        .collect();
    assert!(variables.len() > 9, "{variables:?}");
    for variable in variables {
        assert!(listed(variable), "{variable}");
    }
}

#[test]
fn pod_is_not_killed_before_it_has_stopped() {
    let settings = read("deploy/kubernetes/base/web.env");
    let seconds = |name: &str| -> u64 {
        let value = value(&settings, name);
        value
            .strip_suffix('s')
            .and_then(|seconds| seconds.parse().ok())
            .expect(name)
    };
    let deployment = read("deploy/kubernetes/base/deployment.yaml");
    let grace = value(&deployment, "terminationGracePeriodSeconds: ");
    let grace: u64 = grace.parse().expect("seconds");
    assert!(grace > seconds("SHUTDOWN_DELAY=") + seconds("SHUTDOWN_TIMEOUT="));
}

#[test]
fn versions_are_those_of_compose_and_of_the_program() {
    let compose = read("docker-compose.yml");
    let folder = "deploy/kubernetes";
    for (manifest, image) in [
        ("db/db.yaml", "docker.io/library/postgres:"),
        ("cache/cache.yaml", "docker.io/library/redis:"),
    ] {
        let manifest = read(&format!("{folder}/{manifest}"));
        assert_eq!(value(&manifest, image), value(&compose, image), "{image}");
    }
    let major = value(&compose, "docker.io/library/postgres:");
    let database = read(&format!("{folder}/production/database.yaml"));
    let image = value(&database, "ghcr.io/cloudnative-pg/postgresql:");
    assert!(image.starts_with(&format!("{major}-")), "{image}");
    let production = read(&format!("{folder}/production/kustomization.yaml"));
    let tag = format!("newTag: {} }}", env!("CARGO_PKG_VERSION"));
    assert!(production.contains(&tag), "{tag}");
}

// --- wiring ---

/// The rest of the first line that has this text.
fn value<'a>(text: &'a str, before: &str) -> &'a str {
    let after = text
        .lines()
        .find_map(|line| Some(line.split_once(before)?.1));
    after.expect(before)
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).expect(file)
}

/// The files of a folder, in the order of their names.
fn files(folder: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join(folder)).expect(folder);
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    files
}
