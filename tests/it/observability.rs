//! Prometheus, its rules and the dashboards: the configuration is valid, the rules do what their
//! tests say, and no panel and no alert uses a metric that the service does not export.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::http::Uri;
use lab::ports::free_address;
use lab::process::Process;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::support::prometheus::{OBSERVABILITY, Prometheus, installed, installed_by};
use crate::support::{SOON, Service, World, client, eventually};

const VISITS: &str = "grafana/dashboards/visits.json";
const STORES: &str = "grafana/dashboards/stores.json";
const DATA_SOURCES: &str = "grafana/provisioning/datasources/visitas.yml";
const RUNBOOK: &str = "runbook.md";
/// The variable of a dashboard by which a reader chooses the Prometheus.
const METRICS: &str = "${metrics}";

// --- Prometheus ---

#[test]
fn configuration_and_rules_are_valid() {
    promtool(&["check", "config"], &[path("prometheus.yml")]);
    promtool(&["check", "rules", "--lint-fatal"], &files("rules"));
}

#[test]
#[ignore = "takes long: make faults"]
fn rules_do_what_their_tests_say() {
    promtool(&["test", "rules"], &files("tests"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_alert_is_tested_firing_and_not_firing() {
    let tested = tested_alerts();
    let untested: Vec<_> = alerts(&Prometheus::start(&[]).await)
        .await
        .into_iter()
        .map(|alert| text(&alert["name"]).to_owned())
        .filter(|name| tested.get(name) != Some(&HashSet::from([true, false])))
        .collect();
    assert!(untested.is_empty(), "{untested:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_alert_describes_its_effect_and_links_to_the_runbook() {
    let headings: HashSet<_> = anchors(&read(RUNBOOK)).collect();
    for alert in alerts(&Prometheus::start(&[]).await).await {
        let name = text(&alert["name"]);
        let annotations = &alert["annotations"];
        assert!(text(&annotations["summary"]).len() > 20, "{name}");
        assert!(text(&annotations["description"]).len() > 40, "{name}");
        let severity = text(&alert["labels"]["severity"]);
        assert!(["page", "ticket"].contains(&severity), "{name}");
        assert!(alert["duration"].as_f64() > Some(0.0), "{name}");
        let anchor = name.to_lowercase();
        let page = format!("observability/{RUNBOOK}#{anchor}");
        assert_eq!(text(&annotations["runbook_url"]), page);
        assert!(headings.contains(&anchor), "{anchor} in {headings:?}");
    }
}

/// The first table that a person on call reads.
#[tokio::test(flavor = "multi_thread")]
async fn runbook_lists_every_alert_with_its_severities() {
    let runbook = read(RUNBOOK);
    let mut severities: HashMap<String, HashSet<String>> = HashMap::new();
    for alert in alerts(&Prometheus::start(&[]).await).await {
        let severity = text(&alert["labels"]["severity"]).to_owned();
        let name = text(&alert["name"]).to_owned();
        severities.entry(name).or_default().insert(severity);
    }
    for (name, severities) in severities {
        let link = format!("[{name}](#{})", name.to_lowercase());
        let row = runbook
            .lines()
            .find(|line| line.starts_with('|') && line.contains(&link));
        let listed = row.and_then(|row| row.split('|').nth(2)).expect(&link);
        let listed: HashSet<_> = listed
            .split(',')
            .map(|word| word.trim().to_owned())
            .collect();
        assert_eq!(listed, severities, "{name}");
    }
}

// --- Alertmanager, as the runbook connects it ---

#[tokio::test(flavor = "multi_thread")]
async fn alertmanager_of_the_runbook_sends_each_severity_to_its_receiver() {
    let (listener, received) = webhooks().await;
    let (folder, address) = (tempfile::tempdir().unwrap(), free_address().unwrap());
    let mut recipe = recipe("# alertmanager.yml\n");
    for (own, instead) in [
        ("pager.example", listener.to_string()),
        ("tickets.example", listener.to_string()),
        (
            "/alerts\" }]\n  - name: tickets",
            "/pager\" }]\n  - name: tickets".to_owned(),
        ),
        ("group_wait: 10s", "group_wait: 50ms".to_owned()),
    ] {
        assert!(recipe.contains(own), "{own} in {recipe}");
        recipe = recipe.replace(own, &instead);
    }
    let file = folder.path().join("alertmanager.yml");
    std::fs::write(&file, recipe).unwrap();
    let checked = alertmanager("amtool")
        .arg("check-config")
        .arg(&file)
        .status();
    assert!(checked.unwrap().success());
    let mut command = alertmanager("prometheus-alertmanager");
    command
        .arg(format!("--config.file={}", file.display()))
        .arg(format!("--storage.path={}", folder.path().display()))
        .arg(format!("--web.listen-address={address}"))
        .arg("--cluster.listen-address=");
    let _process = Process::start(command, &folder.path().join("log")).unwrap();
    let client = client();
    let alert = |name: &str, severity: &str| {
        let labels = json!({ "alertname": name, "severity": severity, "job": "visitas" });
        json!({ "labels": labels })
    };
    let alerts = json!([
        alert("VisitasStoreDown", "page"),
        alert("VisitasAvailabilityBurnFast", "page"),
        alert("VisitasVisitsDegraded", "ticket"),
    ]);
    let url = format!("http://{address}/api/v2/alerts");
    eventually("Alertmanager takes alerts", SOON, async || {
        let request = client.post(&url).header("content-type", "application/json");
        let response = request.body(alerts.to_string()).send().await;
        response.is_ok_and(|response| response.status().is_success())
    })
    .await;
    let of = |path: &str, name: &str| (path.to_owned(), name.to_owned());
    let expected = BTreeSet::from([
        of("/pager", "VisitasStoreDown"),
        of("/alerts", "VisitasVisitsDegraded"),
    ]);
    eventually("both receivers are called", SOON, async || {
        *received.lock().unwrap() == expected
    })
    .await;
}

#[test]
fn prometheus_accepts_the_alertmanager_of_the_runbook() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prometheus.yml");
    let configuration = read("prometheus.yml") + &recipe("# prometheus.yml\n");
    std::fs::write(
        &file,
        configuration.replace("rules/", &format!("{OBSERVABILITY}/rules/")),
    )
    .unwrap();
    promtool(&["check", "config"], &[file]);
}

/// First while everything works: a series that exists only after a failure would look like a broken
/// panel. Then while both stores are down, which is when people look at dashboards.
#[tokio::test(flavor = "multi_thread")]
async fn every_expression_returns_series_from_a_live_run() {
    let world = World::of_its_own();
    let service = world.serve().await;
    let prometheus = Prometheus::start(&[service.address]).await;
    let mut expressions = expressions_of_dashboards();
    expressions.extend(expressions_of_data_sources());
    expressions.extend(expressions_of_rules(&prometheus).await);
    assert!(expressions.len() > 90, "{}", expressions.len());
    until_answered(&expressions, &prometheus, &service, |values| {
        values.iter().any(|value| !value.is_nan())
    })
    .await;

    world.redis.kill().unwrap();
    service.until_health("degraded").await;
    service.get("/").await;
    world.postgres.kill().unwrap();
    service.until_health("unavailable").await;
    // Series of failures must exist now, without the default after `or`. No alert fires this soon.
    let without_or = |expression: &Expression| {
        let (text, _) = expression.text.split_once(" or ")?;
        let (of, text) = (expression.of.clone(), text.to_owned());
        (!text.contains("ALERTS") && expression.of.contains(".json"))
            .then_some(Expression { of, text })
    };
    let failing: Vec<_> = expressions.iter().filter_map(without_or).collect();
    assert!(!failing.is_empty());
    expressions.extend(failing);
    let outcome = |outcome| format!("visitas_visits_total{{outcome=\"{outcome}\"}} > 0");
    expressions.extend(["degraded", "failed"].map(|failure| Expression {
        of: format!("this test, visits that are {failure}"),
        text: outcome(failure),
    }));
    until_answered(&expressions, &prometheus, &service, |values| {
        !values.is_empty()
    })
    .await;
}

// --- Grafana ---

#[test]
fn panels_have_unique_ids_a_description_and_the_chosen_prometheus_as_source() {
    let mut names = HashSet::new();
    for file in [VISITS, STORES] {
        let dashboard = dashboard(file);
        assert!(names.insert(text(&dashboard["uid"]).to_owned()), "{file}");
        let mut ids = HashSet::new();
        for panel in panels(&dashboard) {
            let title = text(&panel["title"]);
            assert!(ids.insert(panel["id"].as_u64()), "{title}");
            if panel["type"] == "row" {
                continue;
            }
            assert!(text(&panel["description"]).len() > 40, "{title}");
            assert_eq!(panel["datasource"]["uid"], METRICS, "{title}");
            let targets = array(&panel["targets"]);
            assert!(!targets.is_empty(), "{title}");
            let mut letters = HashSet::new();
            for target in targets {
                assert!(letters.insert(text(&target["refId"])), "{title}");
                assert_eq!(target["datasource"]["uid"], METRICS, "{title}");
            }
        }
    }
}

/// An existing Grafana has its sources under other names.
#[test]
fn sources_are_chosen_by_variables() {
    for file in [VISITS, STORES] {
        let dashboard = dashboard(file);
        let (sources, others): (Vec<_>, Vec<_>) = array(&dashboard["templating"]["list"])
            .iter()
            .partition(|variable| variable["type"] == "datasource");
        let sources = sources
            .iter()
            .map(|source| (text(&source["name"]), text(&source["query"])));
        let expected = [("metrics", "prometheus"), ("traces", "jaeger")];
        assert_eq!(sources.collect::<Vec<_>>(), expected, "{file}");
        for variable in others {
            assert_eq!(variable["datasource"]["uid"], METRICS, "{file}");
        }
        for source in read(file).split("%22datasource%22%3A%22").skip(1) {
            assert!(source.starts_with("${traces}%22"), "{source:.40}");
        }
    }
}

#[test]
fn panels_do_not_overlap() {
    for file in [VISITS, STORES] {
        let mut taken = HashSet::new();
        for panel in panels(&dashboard(file)) {
            let at = |key: &str| panel["gridPos"][key].as_u64().expect("a place");
            assert!(at("x") + at("w") <= 24, "{}", panel["title"]);
            for x in at("x")..at("x") + at("w") {
                for y in at("y")..at("y") + at("h") {
                    assert!(taken.insert((x, y)), "{}", panel["title"]);
                }
            }
        }
    }
}

/// Over a range Grafana would show the last number, however old; only a graph needs a range.
#[test]
fn stats_without_a_graph_query_the_current_value() {
    for file in [VISITS, STORES] {
        for panel in panels(&dashboard(file)) {
            let options = &panel["options"];
            if panel["type"] != "stat" || options["graphMode"] != "none" {
                continue;
            }
            let title = text(&panel["title"]);
            assert_eq!(options["reduceOptions"]["calcs"][0], "last", "{title}");
            for target in array(&panel["targets"]) {
                assert_eq!(target["instant"], true, "{title}");
                assert_eq!(target["range"], false, "{title}");
            }
        }
    }
}

#[test]
fn readme_names_the_link_to_a_trace_as_grafana_does() {
    let label = read(DATA_SOURCES);
    let label = label
        .lines()
        .find_map(|line| line.trim().strip_prefix("urlDisplayLabel: "));
    let readme = include_str!("../../README.md");
    assert!(readme.contains(&format!("*{}*", label.expect("a label"))));
}

#[test]
fn durations_of_visits_lead_to_traces() {
    for file in [VISITS, STORES] {
        for target in targets(&dashboard(file)) {
            let expression = text(&target["expr"]);
            let leads = target["exemplar"] == true;
            let has_exemplars = expression.contains("http_server_request_duration_seconds_bucket");
            assert!(leads || !has_exemplars, "{expression}");
        }
    }
}

#[test]
fn links_between_dashboards_are_valid() {
    let uids = [VISITS, STORES].map(|file| text(&dashboard(file)["uid"]).to_owned());
    for file in [VISITS, STORES] {
        let json = read(file);
        let links: Vec<_> = json.split("\"/d/").skip(1).collect();
        assert!(!links.is_empty(), "{file}");
        for link in links {
            let known = |uid: &String| link.starts_with(uid.as_str());
            assert!(uids.iter().any(known), "{link:.40}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dashboards_name_only_existing_metrics() {
    let world = World::new();
    let exported = world.serve().await.get("/metrics").await.body;
    let mut known: HashSet<String> = exported
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| Some(line.split(['{', ' ']).next()?.to_owned()))
        .collect();
    known.extend(recorded());
    // Series that Prometheus itself writes.
    known.extend(["up", "ALERTS"].map(str::to_owned));
    for expression in expressions_of_dashboards() {
        let names = metrics(&expression.text);
        assert!(!names.is_empty(), "{expression:?}");
        for name in names {
            assert!(known.contains(&name), "{name} in {expression:?}");
        }
    }
}

#[test]
fn runbook_names_only_existing_panels() {
    let mut known = HashSet::new();
    for file in [VISITS, STORES] {
        let dashboard = dashboard(file);
        for panel in panels(&dashboard) {
            known.insert(format!(
                "{} › {}",
                text(&dashboard["title"]),
                text(&panel["title"])
            ));
        }
    }
    let runbook = read(RUNBOOK);
    let named: Vec<_> = runbook
        .split('*')
        .filter(|text| text.contains(" › ") && !text.contains('\n'))
        .collect();
    assert!(named.len() > 20, "{named:?}");
    for panel in named {
        assert!(known.contains(panel), "{panel} in {known:?}");
    }
}

#[test]
fn links_in_the_runbook_lead_to_its_headings() {
    let runbook = read(RUNBOOK);
    let headings: HashSet<_> = anchors(&runbook).collect();
    for link in runbook.split("](#").skip(1) {
        let (anchor, _) = link.split_once(')').expect("the end of a link");
        assert!(headings.contains(anchor), "{anchor} in {headings:?}");
    }
}

// --- wiring ---

/// A block of the runbook, by its first line.
fn recipe(first: &str) -> String {
    let runbook = read(RUNBOOK);
    let (_, block) = runbook
        .split_once(&format!("```yaml\n{first}"))
        .expect(first);
    block.split("```").next().expect("its end").to_owned()
}

fn alertmanager(program: &str) -> std::process::Command {
    installed_by("prometheus-alertmanager", program)
}

/// The alerts that a receiver's path was called with.
type Received = Arc<Mutex<BTreeSet<(String, String)>>>;

/// Starts a server that takes an Alertmanager's notifications.
async fn webhooks() -> (SocketAddr, Received) {
    let received = Received::default();
    let into = Arc::clone(&received);
    let take = async move |uri: Uri, body: String| {
        let notification: Value = serde_json::from_str(&body).expect("a notification");
        for alert in array(&notification["alerts"]) {
            let name = text(&alert["labels"]["alertname"]).to_owned();
            into.lock().unwrap().insert((uri.path().to_owned(), name));
        }
    };
    let router = axum::Router::new().fallback(take);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(axum::serve(listener, router).into_future());
    (address, received)
}

/// An expression, and the file that it is from.
#[derive(Clone, Debug)]
struct Expression {
    of: String,
    text: String,
}

/// Makes visits and polls until `well` accepts the values of each expression. A failure lists all
/// expressions that are left.
async fn until_answered(
    expressions: &[Expression],
    prometheus: &Prometheus,
    service: &Service,
    well: impl Fn(&[f64]) -> bool,
) {
    let deadline = Instant::now() + 3 * SOON;
    let mut left = expressions.to_vec();
    loop {
        service.get("/").await;
        let mut unanswered = Vec::new();
        let mut said = Vec::new();
        for expression in left {
            let values = prometheus.query(&expression.text).await;
            if !values.as_ref().is_ok_and(|values| well(values)) {
                said.push(format!(
                    "{}: {}\n  {values:?}",
                    expression.of, expression.text
                ));
                unanswered.push(expression);
            }
        }
        left = unanswered;
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "no series:\n{}", said.join("\n"));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The expressions of every panel, with Grafana's variables replaced.
fn expressions_of_dashboards() -> Vec<Expression> {
    let mut expressions = Vec::new();
    for file in [VISITS, STORES] {
        for panel in panels(&dashboard(file)) {
            for target in panel["targets"].as_array().into_iter().flatten() {
                let text = text(&target["expr"])
                    .replace("$__rate_interval", "1m")
                    .replace("$__range", "1m")
                    .replace("$instance", ".*");
                assert!(!text.contains('$'), "a variable is left: {text}");
                let of = format!("{file}, {}", panel["title"]);
                expressions.push(Expression { of, text });
            }
        }
    }
    expressions
}

/// The expressions that lead from a span to metrics, for a span without attributes.
fn expressions_of_data_sources() -> Vec<Expression> {
    let queries = read(DATA_SOURCES);
    queries
        .lines()
        .filter_map(|line| line.trim().strip_prefix("query: "))
        .map(|query| Expression {
            of: DATA_SOURCES.to_owned(),
            text: query.replace("$$__tags", ""),
        })
        .collect()
}

/// The expressions of every rule; those of alerts without their comparisons.
async fn expressions_of_rules(prometheus: &Prometheus) -> Vec<Expression> {
    let rules = prometheus.rules().await;
    let expression = |rule: &Value| {
        let query = text(&rule["query"]);
        let is_alert = rule["type"] == "alerting";
        Expression {
            of: format!("rule {}", rule["name"]),
            text: if is_alert {
                without_comparisons(query)
            } else {
                query.to_owned()
            },
        }
    };
    rules.iter().map(expression).collect()
}

/// The expression of an alert without its comparisons, each of which must be with a plain number.
fn without_comparisons(alert: &str) -> String {
    let mut words = alert.split_whitespace().peekable();
    let (mut left, mut comparisons) = (Vec::new(), 0);
    while let Some(word) = words.next() {
        if ["==", "!=", "<=", ">=", "<", ">"].contains(&word) {
            let number = words.next().unwrap_or_default();
            let (number, closing) = number.split_at(number.find(')').unwrap_or(number.len()));
            let is_all = !closing.is_empty()
                || matches!(words.peek(), None | Some(&("and" | "or" | "unless")));
            assert!(
                number.parse::<f64>().is_ok() && is_all,
                "no plain number: {alert}"
            );
            left.push(closing);
            comparisons += 1;
        } else {
            left.push(word);
        }
    }
    assert!(comparisons > 0, "compares nothing: {alert}");
    left.join(" ")
}

/// The metrics that an expression of a dashboard names, recorded ones included.
fn metrics(expression: &str) -> Vec<String> {
    let is_of_name = |letter: char| letter.is_ascii_alphanumeric() || "_:".contains(letter);
    let mut names = Vec::new();
    let mut rest = expression;
    while let Some(start) = rest.find(is_of_name) {
        let name: String = rest[start..]
            .chars()
            .take_while(|&letter| is_of_name(letter))
            .collect();
        rest = &rest[start + name.len()..];
        let selector = rest.starts_with('{');
        if selector || name.contains(':') {
            names.push(name);
        }
        if selector {
            rest = &rest[rest.find('}').expect("the end of a selector")..];
        }
    }
    names
}

/// The names of the series that rules record.
fn recorded() -> HashSet<String> {
    files("rules")
        .iter()
        .flat_map(|file| {
            let rules = std::fs::read_to_string(file).expect("rules");
            let names = rules
                .lines()
                .filter_map(|line| line.trim().strip_prefix("- record: "));
            names.map(str::to_owned).collect::<Vec<_>>()
        })
        .collect()
}

/// The alerts that are tested, each with whether as firing, as not firing, or both.
fn tested_alerts() -> HashMap<String, HashSet<bool>> {
    let mut tested: HashMap<_, HashSet<_>> = HashMap::new();
    for file in files("tests") {
        let cases = std::fs::read_to_string(file).expect("cases");
        let mut lines = cases.lines().map(str::trim);
        while let Some(line) = lines.next() {
            if let Some(alert) = line.strip_prefix("alertname: ") {
                let expected = lines
                    .next()
                    .and_then(|line| line.strip_prefix("exp_alerts:"));
                let firing = expected.expect("what is expected of it").trim() != "[]";
                tested.entry(alert.to_owned()).or_default().insert(firing);
            }
        }
    }
    tested
}

async fn alerts(prometheus: &Prometheus) -> Vec<Value> {
    let mut rules = prometheus.rules().await;
    rules.retain(|rule| rule["type"] == "alerting");
    assert!(rules.len() > 10, "{rules:?}");
    rules
}

/// Runs `promtool` and expects success.
fn promtool(arguments: &[&str], files: &[PathBuf]) {
    let mut command = installed("promtool");
    command.stdout(Stdio::piped()).args(arguments).args(files);
    let output = command.output().expect("promtool runs");
    let said = [output.stdout, output.stderr].concat();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&said)
    );
}

fn path(file: &str) -> PathBuf {
    Path::new(OBSERVABILITY).join(file)
}

fn read(file: &str) -> String {
    std::fs::read_to_string(path(file)).expect(file)
}

/// The files of a folder.
fn files(folder: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(path(folder)).expect(folder);
    let files: Vec<_> = entries.map(|entry| entry.expect("a file").path()).collect();
    assert!(!files.is_empty(), "{folder}");
    files
}

fn dashboard(file: &str) -> Value {
    serde_json::from_str(&read(file)).expect(file)
}

fn panels(dashboard: &Value) -> Vec<Value> {
    array(&dashboard["panels"]).clone()
}

fn targets(dashboard: &Value) -> Vec<Value> {
    let panels = panels(dashboard);
    let targets = panels
        .iter()
        .filter_map(|panel| panel["targets"].as_array());
    targets.flatten().cloned().collect()
}

fn array(value: &Value) -> &Vec<Value> {
    value
        .as_array()
        .unwrap_or_else(|| panic!("no list: {value}"))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

/// The anchors of a page's headings, as renderers of Markdown make them.
fn anchors(page: &str) -> impl Iterator<Item = String> {
    page.lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| {
            line.trim_start_matches('#')
                .trim()
                .to_lowercase()
                .replace(' ', "-")
                .replace(',', "")
        })
}
