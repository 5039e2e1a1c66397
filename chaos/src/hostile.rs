//! Hostile clients, and their effect on the visits of regular clients.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::client;
use lab::measure::Mebibytes;
use lab::paced::{self, Latency, Pace};
use lab::stalls::{StallWatch, Stalls};
use lab::wait::{locked, within};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::ground::{Ground, Needs};
use crate::service::Service;

/// A kind of attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attack {
    /// Headers that arrive byte by byte.
    SlowHeaders,
    /// The first 31 KiB of unfinished headers.
    HalfHeaders,
    /// A body that arrives byte by byte.
    SlowBody,
    /// A chunked body that never ends.
    EndlessBody,
    /// Many pipelined visits whose responses are not read.
    UnreadVisits,
    /// Many pipelined scrapes whose responses are not read; they are longer and cost more.
    UnreadScrapes,
    /// Idle after one request.
    Idle,
    /// Headers of several hundred kilobytes.
    LongHeaders,
    /// Headers of ten thousand fields.
    ManyFields,
    /// Bodies of a hundred megabytes.
    LongBody,
    /// Invalid `traceparent` and `x-request-id` headers.
    AbsurdHeaders,
    /// Header values that are not text.
    InvalidBytes,
}

/// The result of an attack.
#[derive(Clone, Debug)]
pub struct AttackResult {
    /// The kind of attack.
    pub attack: Attack,
    /// The number of attacking clients.
    pub clients: usize,
    /// The 99th percentile of regular clients before the attack, in seconds, for each round.
    pub normal_p99: Vec<f64>,
    /// The 99th percentile of regular clients during the attack, in seconds, for each round.
    pub p99: Vec<f64>,
    /// The share of due regular visits that got a response, in the worst round.
    pub responded: f64,
    /// The longest response to a health probe during the attack.
    pub probe: Duration,
    /// Probes without status 200.
    pub failed_probes: usize,
    /// The counts of the attackers.
    pub counts: AttackerCounts,
    /// The machine's own delays before the attacks.
    pub normal_stalls: Stalls,
    /// The machine's own delays during the attacks.
    pub stalls: Stalls,
}

/// The counts of the attackers.
#[derive(Clone, Debug, Default)]
pub struct AttackerCounts {
    /// The number of connections.
    pub connected: usize,
    /// How often the service closed a connection before the attacker had finished.
    pub closed_early: usize,
    /// The number of responses by status.
    pub responses: BTreeMap<u16, usize>,
}

/// The results of all attacks.
#[derive(Clone, Debug)]
pub struct Hostile {
    /// The result of each attack.
    pub attacks: Vec<AttackResult>,
    /// The peak resident memory.
    pub memory: Option<Mebibytes>,
    /// Memory of queued spans of maximum-length requests while the collector does not respond.
    pub spans: Mebibytes,
    /// Violations.
    pub violations: Vec<String>,
}

/// Counts that are shared by the attackers.
#[derive(Clone, Default)]
struct SharedCounts(Arc<Mutex<AttackerCounts>>);

/// All attacks, in the report's order.
pub const ALL: [Attack; 12] = [
    Attack::SlowHeaders,
    Attack::HalfHeaders,
    Attack::SlowBody,
    Attack::EndlessBody,
    Attack::UnreadVisits,
    Attack::UnreadScrapes,
    Attack::Idle,
    Attack::LongHeaders,
    Attack::ManyFields,
    Attack::LongBody,
    Attack::AbsurdHeaders,
    Attack::InvalidBytes,
];

/// The visits per second of regular clients, and their connections.
const REGULAR_RATE: f64 = 200.0;
const REGULAR_CLIENTS: usize = 8;
/// Short enough that slow headers time out during a round.
const HEADER_TIMEOUT: &str = "1s";

/// Timeout for the attackers' connections to close, and the pause between two checks.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);
const MOMENT: Duration = Duration::from_millis(200);

/// The pause between two bytes of a slow client.
const DRIP: Duration = Duration::from_millis(200);
/// The pause between two connections of an attacker.
const PAUSE: Duration = Duration::from_millis(20);
/// Timeout for sending an attack's first bytes.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);
/// The number of pipelined requests.
const UNREAD: usize = 100;
/// The delay between the starts of two attackers.
const STAGGER: Duration = Duration::from_micros(200);

/// Requests with a path and a user agent of this many bytes, each of which is sampled.
const LONG_REQUESTS: usize = 12_800;
const LONG: usize = 15_000;
/// The series of spans that were dropped because the exporter's queue was full.
const QUEUE_FULL: &str = "otel_sdk_processor_span_processed_total{\
    otel_component_name=\"batching_span_processor/0\",\
    otel_component_type=\"batching_span_processor\",error_type=\"queue_full\"}";

/// Runs all attacks in sequence, each for `rounds` rounds of `duration`. Regular clients visit
/// during each attack, and for the same time before it.
pub fn run(rounds: usize, duration: Duration, idle: usize) -> Result<Hostile> {
    // With a lower limit, some attackers have to wait.
    rlimit::increase_nofile_limit(idle as u64 + 2000).ok();
    let ground = Ground::start(Needs::default())?;
    let mut service = Service::new(&ground)?;
    service.set("HEADER_TIMEOUT", HEADER_TIMEOUT);
    service.start()?;
    service.wait_until_ready()?;
    regular_visits(service.address, duration)?;

    let mut attacks = Vec::new();
    let mut violations = Vec::new();
    for attack in ALL {
        let mut result = AttackResult::new(attack, attack.clients(idle));
        for _ in 0..rounds {
            result.run_round(&ground, service.address, duration)?;
            if !connections_close(&service) {
                violations.push(format!("connections of {attack:?} stay open"));
            }
        }
        attacks.push(result);
    }

    violations.extend(service.panics());
    let (total, _) = client::visit(service.address)?;
    let rows = ground.row_times()?.len();
    if usize::try_from(total).ok() != Some(rows) {
        violations.push(format!(
            "the service returned {total} with {rows} rows in the table"
        ));
    }
    violations.extend(attacks.iter().flat_map(|result| result.violations(rounds)));
    Ok(Hostile {
        attacks,
        memory: service.peak_memory(),
        spans: memory_of_spans(&ground)?,
        violations,
    })
}

/// Sends long requests to a service whose collector accepts connections and never responds, and
/// returns the memory that the queued spans take.
fn memory_of_spans(ground: &Ground) -> Result<Mebibytes> {
    // The system completes the connections; no data is ever read.
    let collector = TcpListener::bind("127.0.0.1:0")?;
    let mut service = Service::new(ground)?;
    let endpoint = format!("http://{}", collector.local_addr()?);
    service.set("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint);
    service.start()?;
    service.wait_until_ready()?;
    let memory = || service.memory().context("no /proc");
    let before = memory()?;
    let (path, agent) = ("p".repeat(LONG), "a".repeat(LONG));
    let request = format!(
        "GET /{path} HTTP/1.1\r\nhost: chaos\r\nuser-agent: {agent}\r\nconnection: close\r\n\r\n"
    );
    for _ in 0..LONG_REQUESTS {
        let mut stream = std::net::TcpStream::connect(service.address)?;
        stream.write_all(request.as_bytes())?;
        let mut response = String::new();
        stream.read_to_string(&mut response)?;
        ensure!(
            response.starts_with("HTTP/1.1 404"),
            "unexpected response {response}"
        );
    }
    let dropped = service.metric(QUEUE_FULL);
    ensure!(dropped > Some(0.0), "the span queue was never full");
    Ok(Mebibytes(memory()?.0 - before.0))
}

/// Waits until the attackers' connections are closed, and returns whether they are.
fn connections_close(service: &Service) -> bool {
    // The scrape's own connection is the only one left.
    let closed = within(CLOSE_TIMEOUT, || {
        let is_alone = service.metric("visitas_http_connections") == Some(1.0);
        if !is_alone {
            std::thread::sleep(MOMENT);
        }
        is_alone
    });
    std::thread::sleep(MOMENT);
    closed
}

/// Visits of regular clients.
fn regular_visits(address: SocketAddr, duration: Duration) -> Result<Latency> {
    paced::run(
        address,
        REGULAR_CLIENTS,
        Pace::Constant(REGULAR_RATE),
        duration,
    )
}

impl AttackResult {
    fn new(attack: Attack, clients: usize) -> Self {
        Self {
            attack,
            clients,
            normal_p99: Vec::new(),
            p99: Vec::new(),
            responded: 1.0,
            probe: Duration::ZERO,
            failed_probes: 0,
            counts: AttackerCounts::default(),
            normal_stalls: Stalls::default(),
            stalls: Stalls::default(),
        }
    }

    /// Violations by the service, and defects of the attack itself.
    fn violations(&self, rounds: usize) -> Vec<String> {
        let (attack, counts) = (self.attack, &self.counts);
        let mut violations = Vec::new();
        let unexpected = counts
            .responses
            .keys()
            .filter(|status| !attack.allowed().contains(status));
        violations.extend(unexpected.map(|status| format!("{attack:?} got the status {status}")));
        if counts.connected < rounds * self.clients {
            let connected = counts.connected;
            violations.push(format!("{attack:?} connected only {connected} times"));
        }
        if !attack.allowed().is_empty() && counts.responses.is_empty() {
            violations.push(format!("{attack:?} got no response"));
        }
        if matches!(attack, Attack::SlowHeaders | Attack::HalfHeaders) && counts.closed_early == 0 {
            violations.push(format!("no connection of {attack:?} was closed"));
        }
        violations
    }

    /// Runs one round.
    fn run_round(
        &mut self,
        ground: &Ground,
        address: SocketAddr,
        duration: Duration,
    ) -> Result<()> {
        let attack = self.attack;
        let folder = devstack::folder()?;
        let stalls = StallWatch::start(&folder)?;
        self.normal_p99.push(regular_visits(address, duration)?.p99);
        self.normal_stalls = self.normal_stalls.max(stalls.stop());
        let (stop, stopped) = watch::channel(false);
        let counts = SharedCounts::default();
        let attackers: Vec<_> = (0_u32..)
            .take(self.clients)
            .map(|index| {
                let mut stopped = stopped.clone();
                let counts = counts.clone();
                ground.runtime.spawn(async move {
                    let stop = async { stopped.wait_for(|stop| *stop).await.map(drop).ok() };
                    let work = async {
                        sleep(STAGGER * index).await;
                        attack.make(address, &counts).await;
                    };
                    tokio::select! {
                        () = work => {}
                        _ = stop => {}
                    }
                })
            })
            .collect();
        std::thread::sleep(STAGGER * u32::try_from(self.clients)?);
        let stalls = StallWatch::start(&folder)?;
        let probes = Probes::start(address);
        let during = regular_visits(address, duration)
            .with_context(|| format!("regular visits during {attack:?}"))?;
        let (probe, failed_probes) = probes.stop();
        self.stalls = self.stalls.max(stalls.stop());
        stop.send_replace(true);
        for attacker in attackers {
            ground.runtime.block_on(attacker).ok();
        }
        self.p99.push(during.p99);
        self.responded = self.responded.min(during.responded);
        self.probe = self.probe.max(probe);
        self.failed_probes += failed_probes;
        let counts = counts.lock();
        self.counts.connected += counts.connected;
        self.counts.closed_early += counts.closed_early;
        for (status, times) in &counts.responses {
            *self.counts.responses.entry(*status).or_default() += times;
        }
        Ok(())
    }
}

impl Attack {
    fn clients(self, idle: usize) -> usize {
        match self {
            Self::SlowHeaders | Self::SlowBody => 500,
            Self::UnreadVisits | Self::UnreadScrapes => 50,
            Self::Idle => idle,
            Self::HalfHeaders => idle * 2 / 5,
            Self::EndlessBody
            | Self::LongHeaders
            | Self::ManyFields
            | Self::LongBody
            | Self::AbsurdHeaders
            | Self::InvalidBytes => 10,
        }
    }

    /// The allowed statuses of the responses.
    fn allowed(self) -> &'static [u16] {
        match self {
            Self::SlowHeaders | Self::HalfHeaders | Self::UnreadVisits | Self::UnreadScrapes => &[],
            Self::SlowBody | Self::EndlessBody | Self::LongBody => &[405],
            Self::Idle | Self::AbsurdHeaders => &[200],
            Self::LongHeaders | Self::ManyFields => &[431],
            Self::InvalidBytes => &[200, 400],
        }
    }

    /// Repeats the attack until the future is dropped.
    async fn make(self, address: SocketAddr, counts: &SharedCounts) {
        let mut turn = 0;
        loop {
            // Errors are expected: the service closes connections.
            self.strike(address, turn, counts).await.ok();
            turn += 1;
            sleep(PAUSE).await;
        }
    }

    async fn strike(self, address: SocketAddr, turn: usize, counts: &SharedCounts) -> Result<()> {
        let socket = TcpSocket::new_v4()?;
        if self.reads_nothing() {
            socket.set_recv_buffer_size(4096)?;
        }
        let mut stream = socket.connect(address).await?;
        counts.lock().connected += 1;
        // The service is allowed to respond before it has read everything.
        timeout(SEND_TIMEOUT, stream.write_all(&self.opening(turn)))
            .await
            .ok();
        match self {
            Self::SlowHeaders | Self::UnreadVisits | Self::UnreadScrapes => {
                drip(&mut stream, b"x", counts).await;
            }
            Self::HalfHeaders => {
                // The service must close without a response.
                if count_response(&mut stream, counts).await.is_err() {
                    counts.lock().closed_early += 1;
                }
            }
            Self::SlowBody => {
                // The service can respond without reading the body.
                timeout(DRIP, count_response(&mut stream, counts))
                    .await
                    .ok();
                drip(&mut stream, b"x", counts).await;
            }
            Self::EndlessBody => {
                count_response(&mut stream, counts).await?;
                drip(&mut stream, b"1\r\nx\r\n", counts).await;
            }
            Self::Idle => {
                count_response(&mut stream, counts).await?;
                read_until_closed(&mut stream).await?;
            }
            Self::LongHeaders
            | Self::ManyFields
            | Self::LongBody
            | Self::AbsurdHeaders
            | Self::InvalidBytes => count_response(&mut stream, counts).await?,
        }
        Ok(())
    }

    fn reads_nothing(self) -> bool {
        matches!(self, Self::UnreadVisits | Self::UnreadScrapes)
    }

    /// The first bytes of the attack, by the number of the turn.
    fn opening(self, turn: usize) -> Vec<u8> {
        let request = |line: &str, fields: &[u8]| {
            let start = format!("{line} HTTP/1.1\r\nhost: chaos\r\n");
            [start.as_bytes(), fields].concat()
        };
        match self {
            Self::SlowHeaders => request("GET /", b"x-slow: "),
            Self::HalfHeaders => half_headers(),
            Self::SlowBody => request("POST /", b"content-length: 60000\r\n\r\n"),
            Self::EndlessBody => {
                let fields = b"transfer-encoding: chunked\r\n\r\n";
                request("POST /", &[fields, b"1\r\nx\r\n".as_slice()].concat())
            }
            Self::UnreadVisits => request("GET /", b"\r\n").repeat(UNREAD),
            Self::UnreadScrapes => request("GET /metrics", b"\r\n").repeat(UNREAD),
            Self::Idle => request("GET /health/live", b"\r\n"),
            Self::LongHeaders => {
                let long = "x".repeat(300_000);
                request("GET /", format!("x-long: {long}\r\n\r\n").as_bytes())
            }
            Self::ManyFields => request(
                "GET /",
                &[&b"x: y\r\n".repeat(10_000)[..], b"\r\n"].concat(),
            ),
            Self::LongBody => {
                let fields = b"content-length: 104857600\r\n\r\n";
                request("POST /", &[&fields[..], &*vec![b'x'; 64 * 1024]].concat())
            }
            Self::AbsurdHeaders | Self::InvalidBytes => {
                let fields = self.headers(turn);
                request(
                    "GET /",
                    &[b"connection: close\r\n", &fields[..], b"\r\n\r\n"].concat(),
                )
            }
        }
    }

    fn headers(self, turn: usize) -> Vec<u8> {
        let many = |letter: &str, times: usize| letter.repeat(times);
        let absurd = [
            format!("traceparent: 00-{}-{}-01", many("0", 32), many("0", 16)),
            format!("traceparent: ff-{}-{}-01", many("f", 32), many("f", 16)),
            format!("traceparent: {}", many("00-", 5000)),
            "traceparent: \r\ntraceparent: 00\r\ntracestate: =,=,=".to_owned(),
            format!("x-request-id: {}", many("a", 20_000)),
            "x-request-id: \r\nx-request-id: two".to_owned(),
            "x-request-id: \"}{\\u0000' or 1=1 --".to_owned(),
            format!("tracestate: {}", many("a=b,", 4000)),
        ];
        let invalid: [&[u8]; 6] = [
            b"x-odd: \x80\xff\xfe",
            b"x-odd: \x00",
            b"x-odd: a\rb",
            b"user-agent: \xff\xfe\xc3\x28",
            b"x-request-id: \xf0\x9f\x92\xa5",
            b"traceparent: 00-\xff",
        ];
        if self == Self::AbsurdHeaders {
            absurd[turn % absurd.len()].clone().into_bytes()
        } else {
            invalid[turn % invalid.len()].to_vec()
        }
    }
}

impl SharedCounts {
    fn lock(&self) -> MutexGuard<'_, AttackerCounts> {
        locked(&self.0)
    }
}

/// Unfinished headers, slightly below the maximum length.
pub(crate) fn half_headers() -> Vec<u8> {
    [
        b"GET / HTTP/1.1\r\nhost: chaos\r\nx-half: ",
        &*vec![b'x'; 31 * 1024],
    ]
    .concat()
}

/// Sends a few bytes from time to time until the service closes.
async fn drip(stream: &mut TcpStream, bytes: &[u8], counts: &SharedCounts) {
    while stream.write_all(bytes).await.is_ok() {
        sleep(DRIP).await;
    }
    counts.lock().closed_early += 1;
}

/// Reads until the service closes.
async fn read_until_closed(stream: &mut TcpStream) -> Result<()> {
    let mut rest = [0; 1024];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}

/// Counts the status of a response.
async fn count_response(stream: &mut TcpStream, counts: &SharedCounts) -> Result<()> {
    let mut bytes = [0; 12];
    timeout(Duration::from_secs(5), stream.read_exact(&mut bytes)).await??;
    let status = std::str::from_utf8(&bytes[9..])?.parse()?;
    *counts.lock().responses.entry(status).or_default() += 1;
    Ok(())
}

/// A thread that sends health probes.
struct Probes {
    running: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<(Duration, usize)>,
}

const PROBE_EVERY: Duration = Duration::from_millis(50);

impl Probes {
    fn start(address: SocketAddr) -> Self {
        let running = Arc::new(AtomicBool::new(true));
        let keeps_running = Arc::clone(&running);
        let thread = std::thread::spawn(move || {
            let (mut worst, mut failed) = (Duration::ZERO, 0);
            while keeps_running.load(Ordering::Relaxed) {
                for path in ["/health/live", "/health/ready"] {
                    let asked = Instant::now();
                    let response = client::get(address, path);
                    worst = worst.max(asked.elapsed());
                    failed += usize::from(!response.is_ok_and(|response| response.status == 200));
                }
                std::thread::sleep(PROBE_EVERY);
            }
            (worst, failed)
        });
        Self { running, thread }
    }

    /// Returns the longest response and the number of failed probes.
    fn stop(self) -> (Duration, usize) {
        self.running.store(false, Ordering::Relaxed);
        self.thread.join().unwrap_or((Duration::MAX, usize::MAX))
    }
}
