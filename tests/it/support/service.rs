//! The program, started as a user would start it, and what it says.

use std::net::SocketAddr;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use lab::metrics::Metrics;
pub(crate) use lab::output::Reader;
use lab::process::{Process, Signal};
use lab::wait::locked;
use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode};
use serde_json::Value;

use super::{SOON, eventually};

/// A running service. Dropping it kills it.
pub(crate) struct Service {
    pub(crate) address: SocketAddr,
    pub(crate) client: reqwest::Client,
    process: Mutex<Process>,
}

/// A response, read to its end.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Response {
    /// Reads a response to its end.
    pub(crate) async fn read(response: reqwest::Response) -> reqwest::Result<Self> {
        Ok(Self {
            status: response.status(),
            headers: response.headers().clone(),
            body: response.text().await?,
        })
    }

    /// All that was answered.
    pub(crate) fn text(&self) -> String {
        format!("{} {:?}\n{}\n", self.status, self.headers, self.body)
    }

    /// The body as JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body)
            .unwrap_or_else(|error| panic!("{error} in {:?}", self.body))
    }

    /// The value of a header, or nothing.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().expect("a header in ASCII"))
    }
}

/// The program with nothing in its environment but these settings.
pub(crate) fn program(arguments: &[&str], settings: &[(String, String)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_visitas"));
    command
        .args(arguments)
        .env_clear()
        .envs(lab::program::COVERAGE)
        .envs(settings.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null());
    command
}

impl Service {
    /// Starts a service on a free port and waits until it listens.
    pub(crate) async fn start(settings: &[(String, String)]) -> Self {
        Self::spawn(program(&["serve"], settings)).await
    }

    /// Starts a service by a command that becomes it, and waits until it listens; on a free port
    /// if the command says nothing else.
    pub(crate) async fn spawn(command: Command) -> Self {
        Self::read_by(Reader::Stays, command).await
    }

    /// The same for a service whose log is read like this.
    pub(crate) async fn read_by(reader: Reader, mut command: Command) -> Self {
        if !command.get_envs().any(|(name, _)| name == "BIND_ADDR") {
            command.env("BIND_ADDR", "127.0.0.1:0");
        }
        let process = Process::start_read_by(reader, command).expect("the program starts");
        // Made before anything can fail, so that a failing test leaves no process behind.
        let mut service = Self {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            client: client(),
            process: Mutex::new(process),
        };
        eventually("the service listens", SOON, async || {
            let has_ended = service.process().has_ended().expect("its status");
            assert!(!has_ended, "it ended: {}", service.printed());
            !service.logged("listening").is_empty()
        })
        .await;
        let address = service.logged("listening")[0]["address"].clone();
        service.address = serde_json::from_value(address).expect("an address");
        service
    }

    /// The address of a path.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Waits until visits are recorded and counted.
    pub(crate) async fn until_ready(&self) {
        self.until_health("ok").await;
    }

    /// Waits until `/health` has this status.
    pub(crate) async fn until_health(&self, status: &str) {
        eventually(&format!("health is {status}"), SOON, async || {
            self.get("/health").await.json()["status"] == status
        })
        .await;
    }

    /// Asks for a path.
    pub(crate) async fn get(&self, path: &str) -> Response {
        self.ask(Method::GET, path, HeaderMap::new()).await
    }

    /// Asks, with any method and headers.
    pub(crate) async fn ask(&self, method: Method, path: &str, headers: HeaderMap) -> Response {
        self.try_ask(method, path, headers)
            .await
            .expect("a response")
    }

    /// Asks, where a response is not certain.
    pub(crate) async fn try_ask(
        &self,
        method: Method,
        path: &str,
        headers: HeaderMap,
    ) -> reqwest::Result<Response> {
        let response = self
            .client
            .request(method, self.url(path))
            .headers(headers)
            .send()
            .await?;
        Response::read(response).await
    }

    /// Begins a visit, whose response is awaited later.
    pub(crate) fn begin_visit(&self) -> tokio::task::JoinHandle<Response> {
        let request = self.client.get(self.url("/"));
        tokio::spawn(async move {
            let response = request.send().await.expect("a response");
            Response::read(response).await.expect("a body")
        })
    }

    /// How many visits had this outcome.
    pub(crate) async fn counted(&self, outcome: &str) -> u64 {
        self.metrics().await.visits(outcome).expect("a count")
    }

    /// Waits until so many visits wait for the writer.
    pub(crate) async fn until_queued(&self, visits: u32) {
        eventually("the visits are queued", SOON, async || {
            self.metric("visitas_queue_depth").await == Some(f64::from(visits))
        })
        .await;
    }

    /// Makes a visit and returns its two numbers. Both stores must be up.
    pub(crate) async fn visit(&self) -> (i64, i64) {
        let response = self.get("/").await;
        assert_eq!(response.status, StatusCode::OK, "{}", response.body);
        let json = response.json();
        let number = |field: &str| json[field].as_i64().unwrap_or_else(|| panic!("{json}"));
        (number("total_registros_db"), number("visitas_redis"))
    }

    /// A series of `/metrics`, by its name and labels as they are written there.
    pub(crate) async fn metric(&self, series: &str) -> Option<f64> {
        self.metrics().await.value(series)
    }

    /// All of `/metrics`.
    pub(crate) async fn metrics(&self) -> Metrics {
        Metrics(self.get("/metrics").await.body)
    }

    /// The lines of the log so far.
    pub(crate) fn log(&self) -> Vec<Value> {
        let lines = self.process().output();
        lines
            .iter()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}")))
            .collect()
    }

    /// The lines of the log that have this message.
    pub(crate) fn logged(&self, message: &str) -> Vec<Value> {
        let mut log = self.log();
        log.retain(|line| line["message"] == message);
        log
    }

    /// Everything that was printed so far, errors included.
    pub(crate) fn printed(&self) -> String {
        self.process().printed().join("\n")
    }

    /// The process.
    pub(crate) fn pid(&self) -> u32 {
        self.process().id()
    }

    /// Sends a signal, such as `TERM` or `INT`.
    pub(crate) fn signal(&self, signal: &str) {
        let signal = match signal {
            "TERM" => Signal::TERM,
            "INT" => Signal::INT,
            "HUP" => Signal::HUP,
            _ => panic!("SIG{signal} is not known here"),
        };
        self.process().signal(signal).expect("it runs");
    }

    /// Waits until the process ends by itself.
    pub(crate) async fn ended(&self, timeout: Duration) -> ExitStatus {
        let mut status = None;
        eventually("the process ends", timeout, async || {
            status = self.process().status().expect("its status");
            status.is_some()
        })
        .await;
        status.expect("seen above")
    }

    /// Stops the service as an orchestrator would, and expects success.
    pub(crate) async fn stop(&self) {
        self.signal("TERM");
        let status = self.ended(SOON).await;
        assert!(status.success(), "{status}: {}", self.printed());
    }

    fn process(&self) -> MutexGuard<'_, Process> {
        locked(&self.process)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // At once: it has nothing to finish.
        self.process().kill().ok();
    }
}

/// A client that keeps connections alive.
pub(crate) fn client() -> reqwest::Client {
    // The client wants a TLS provider although nothing here is encrypted; the first one stays.
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    reqwest::Client::builder()
        .no_proxy()
        // Without the system's certificates, which take longer to read than a request takes.
        .tls_certs_only([])
        .build()
        .expect("a client")
}
