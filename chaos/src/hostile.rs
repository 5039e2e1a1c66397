//! Clients that mean no good, beside some that do: what the latter notice.

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

/// What clients can do to a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attack {
    /// A head that comes byte by byte.
    SlowHead,
    /// The first 31 KiB of a head, and no more.
    HalfHead,
    /// A body that comes byte by byte.
    SlowBody,
    /// A body in chunks that never ends.
    EndlessBody,
    /// Many visits in one go, and no answer is read.
    UnreadVisits,
    /// The same with scrapes, which are longer and take more work.
    UnreadScrapes,
    /// Nothing, after one request.
    Idle,
    /// Heads of some hundred kilobytes.
    LongHead,
    /// Heads of ten thousand fields.
    ManyFields,
    /// Bodies of a hundred megabytes.
    LongBody,
    /// `traceparent` and `x-request-id` that make no sense.
    AbsurdHeaders,
    /// Values that are no text.
    InvalidBytes,
}

/// What came of an attack.
#[derive(Clone, Debug)]
pub struct Damage {
    /// Which it was.
    pub attack: Attack,
    /// How many clients made it.
    pub clients: usize,
    /// Seconds, of each round: of a hundred visits of others, one took longer before it.
    pub normal_p99: Vec<f64>,
    /// The same while it lasted.
    pub p99: Vec<f64>,
    /// Of the visits that were due meanwhile, the share that was answered, in the worst round.
    pub answered: f64,
    /// The worst latency of a probe meanwhile.
    pub probe: Duration,
    /// Probes that were not answered 200.
    pub failed_probes: usize,
    /// What the attackers saw.
    pub seen: Sightings,
    /// What the machine kept waiting before the attacks.
    pub normal_stalls: Stalls,
    /// The same while they lasted.
    pub stalls: Stalls,
}

/// What attackers saw.
#[derive(Clone, Debug, Default)]
pub struct Sightings {
    /// How often they were connected.
    pub connected: usize,
    /// How often the service closed before they had said all they would.
    pub cut: usize,
    /// What they were answered, by status, how often.
    pub answers: BTreeMap<u16, usize>,
}

/// What came of all attacks.
#[derive(Clone, Debug)]
pub struct Hostile {
    /// Each attack.
    pub damages: Vec<Damage>,
    /// The most memory that was resident.
    pub memory: Option<Mebibytes>,
    /// Memory of spans that no collector takes, of requests that are as long as they may be.
    pub spans: Mebibytes,
    /// Violations.
    pub complaints: Vec<String>,
}

/// Shared by the attackers.
#[derive(Clone, Default)]
struct Witness(Arc<Mutex<Sightings>>);

/// All attacks, in the report's order.
pub const ALL: [Attack; 12] = [
    Attack::SlowHead,
    Attack::HalfHead,
    Attack::SlowBody,
    Attack::EndlessBody,
    Attack::UnreadVisits,
    Attack::UnreadScrapes,
    Attack::Idle,
    Attack::LongHead,
    Attack::ManyFields,
    Attack::LongBody,
    Attack::AbsurdHeaders,
    Attack::InvalidBytes,
];

/// Visits of those who mean well, a second, and how many connections they use.
const GOOD_RATE: f64 = 200.0;
const GOOD_CLIENTS: usize = 8;
/// So that slow heads are cut while somebody watches.
const HEADER_TIMEOUT: &str = "1s";

/// When to give up on calm, and how long it lasts before it counts as such.
const PATIENCE: Duration = Duration::from_secs(30);
const MOMENT: Duration = Duration::from_millis(200);

/// Between two bytes of whoever is slow.
const DRIP: Duration = Duration::from_millis(200);
/// Between two requests of whoever is not.
const PAUSE: Duration = Duration::from_millis(20);
/// Whoever is not read for this long has said enough.
const LONGEST_SAYING: Duration = Duration::from_secs(1);
/// How many requests are made before an answer is read.
const UNREAD: usize = 100;
/// Between two connections that are opened.
const STAGGER: Duration = Duration::from_micros(200);

/// Requests with a path and a user agent of this many bytes, each of which is sampled.
const LONG_REQUESTS: usize = 12_800;
const LONG: usize = 15_000;
/// Series of the spans that the exporter's queue has no room for.
const QUEUE_FULL: &str = "otel_sdk_processor_span_processed_total{\
    otel_component_name=\"batching_span_processor/0\",\
    otel_component_type=\"batching_span_processor\",error_type=\"queue_full\"}";

/// Makes one attack after the other, each so many times for `duration`, with so many idle
/// connections. Others visit meanwhile, and for as long before each.
pub fn run(rounds: usize, duration: Duration, idle: usize) -> Result<Hostile> {
    // Where that is not enough, attackers have to wait.
    rlimit::increase_nofile_limit(idle as u64 + 2000).ok();
    let ground = Ground::start(Needs::default())?;
    let mut service = Service::new(&ground)?;
    service.set("HEADER_TIMEOUT", HEADER_TIMEOUT);
    service.start()?;
    service.until_ready()?;
    good(service.address, duration)?;

    let mut damages = Vec::new();
    let mut complaints = Vec::new();
    for attack in ALL {
        let mut damage = Damage::new(attack, attack.clients(idle));
        for _ in 0..rounds {
            damage.suffer(&ground, service.address, duration)?;
            if !calms_down(&service) {
                complaints.push(format!("connections of {attack:?} stay"));
            }
        }
        damages.push(damage);
    }

    complaints.extend(service.panics());
    let (total, _) = client::visit(service.address)?;
    let rows = ground.moments()?.len();
    if usize::try_from(total).ok() != Some(rows) {
        complaints.push(format!("the service says {total} where {rows} rows are"));
    }
    complaints.extend(damages.iter().flat_map(|damage| damage.complaints(rounds)));
    Ok(Hostile {
        damages,
        memory: service.peak_memory(),
        spans: memory_of_spans(&ground)?,
        complaints,
    })
}

/// Makes long requests of a service whose collector accepts the connection and stalls, and says how
/// much memory that takes.
fn memory_of_spans(ground: &Ground) -> Result<Mebibytes> {
    // The system accepts for it, and nothing is ever read.
    let collector = TcpListener::bind("127.0.0.1:0")?;
    let mut service = Service::new(ground)?;
    let endpoint = format!("http://{}", collector.local_addr()?);
    service.set("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint);
    service.start()?;
    service.until_ready()?;
    let memory = || service.memory().context("no /proc");
    let before = memory()?;
    let (path, agent) = ("p".repeat(LONG), "a".repeat(LONG));
    let request = format!(
        "GET /{path} HTTP/1.1\r\nhost: chaos\r\nuser-agent: {agent}\r\nconnection: close\r\n\r\n"
    );
    for _ in 0..LONG_REQUESTS {
        let mut stream = std::net::TcpStream::connect(service.address)?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 404"), "answered {answer}");
    }
    let dropped = service.metric(QUEUE_FULL);
    ensure!(dropped > Some(0.0), "the queue of spans was never full");
    Ok(Mebibytes(memory()?.0 - before.0))
}

/// Waits until whoever attacked is gone and forgotten, and says whether that came to pass.
fn calms_down(service: &Service) -> bool {
    // The one that asks is one.
    let calm = within(PATIENCE, || {
        let is_alone = service.metric("visitas_http_connections") == Some(1.0);
        if !is_alone {
            std::thread::sleep(MOMENT);
        }
        is_alone
    });
    std::thread::sleep(MOMENT);
    calm
}

/// Visits of those who mean well.
fn good(address: SocketAddr, duration: Duration) -> Result<Latency> {
    paced::run(address, GOOD_CLIENTS, Pace::Constant(GOOD_RATE), duration)
}

impl Damage {
    fn new(attack: Attack, clients: usize) -> Self {
        Self {
            attack,
            clients,
            normal_p99: Vec::new(),
            p99: Vec::new(),
            answered: 1.0,
            probe: Duration::ZERO,
            failed_probes: 0,
            seen: Sightings::default(),
            normal_stalls: Stalls::default(),
            stalls: Stalls::default(),
        }
    }

    /// Violations, of the service or of the attack.
    fn complaints(&self, rounds: usize) -> Vec<String> {
        let (attack, seen) = (self.attack, &self.seen);
        let mut complaints = Vec::new();
        let others = seen
            .answers
            .keys()
            .filter(|status| !attack.allowed().contains(status));
        complaints.extend(others.map(|status| format!("{attack:?} was answered {status}")));
        if seen.connected < rounds * self.clients {
            let connected = seen.connected;
            complaints.push(format!("{attack:?} was connected {connected} times only"));
        }
        if !attack.allowed().is_empty() && seen.answers.is_empty() {
            complaints.push(format!("{attack:?} was not answered"));
        }
        if matches!(attack, Attack::SlowHead | Attack::HalfHead) && seen.cut == 0 {
            complaints.push(format!("{attack:?} was never cut"));
        }
        complaints
    }

    /// One round.
    fn suffer(&mut self, ground: &Ground, address: SocketAddr, duration: Duration) -> Result<()> {
        let attack = self.attack;
        let folder = devstack::folder()?;
        let stalls = StallWatch::start(&folder)?;
        self.normal_p99.push(good(address, duration)?.p99);
        self.normal_stalls = self.normal_stalls.max(stalls.stop());
        let (stop, stopped) = watch::channel(false);
        let witness = Witness::default();
        let attackers: Vec<_> = (0_u32..)
            .take(self.clients)
            .map(|index| {
                let mut stopped = stopped.clone();
                let witness = witness.clone();
                ground.runtime.spawn(async move {
                    let stop = async { stopped.wait_for(|stop| *stop).await.map(drop).ok() };
                    let work = async {
                        sleep(STAGGER * index).await;
                        attack.make(address, &witness).await;
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
        let during =
            good(address, duration).with_context(|| format!("good visits beside {attack:?}"))?;
        let (probe, failed_probes) = probes.stop();
        self.stalls = self.stalls.max(stalls.stop());
        stop.send_replace(true);
        for attacker in attackers {
            ground.runtime.block_on(attacker).ok();
        }
        self.p99.push(during.p99);
        self.answered = self.answered.min(during.answered);
        self.probe = self.probe.max(probe);
        self.failed_probes += failed_probes;
        let seen = witness.seen();
        self.seen.connected += seen.connected;
        self.seen.cut += seen.cut;
        for (status, times) in &seen.answers {
            *self.seen.answers.entry(*status).or_default() += times;
        }
        Ok(())
    }
}

impl Attack {
    fn clients(self, idle: usize) -> usize {
        match self {
            Self::SlowHead | Self::SlowBody => 500,
            Self::UnreadVisits | Self::UnreadScrapes => 50,
            Self::Idle => idle,
            Self::HalfHead => idle * 2 / 5,
            Self::EndlessBody
            | Self::LongHead
            | Self::ManyFields
            | Self::LongBody
            | Self::AbsurdHeaders
            | Self::InvalidBytes => 10,
        }
    }

    /// The statuses that it may be answered with.
    fn allowed(self) -> &'static [u16] {
        match self {
            Self::SlowHead | Self::HalfHead | Self::UnreadVisits | Self::UnreadScrapes => &[],
            Self::SlowBody | Self::EndlessBody | Self::LongBody => &[405],
            Self::Idle | Self::AbsurdHeaders => &[200],
            Self::LongHead | Self::ManyFields => &[431],

            Self::InvalidBytes => &[200, 400],
        }
    }

    /// Goes on until it is dropped.
    async fn make(self, address: SocketAddr, witness: &Witness) {
        let mut turn = 0;
        loop {
            // Whatever comes of it is answered, or is not.
            self.strike(address, turn, witness).await.ok();
            turn += 1;
            sleep(PAUSE).await;
        }
    }

    async fn strike(self, address: SocketAddr, turn: usize, witness: &Witness) -> Result<()> {
        let socket = TcpSocket::new_v4()?;
        if self.reads_nothing() {
            socket.set_recv_buffer_size(4096)?;
        }
        let mut stream = socket.connect(address).await?;
        witness.seen().connected += 1;
        // What is refused need not be read to its end.
        timeout(LONGEST_SAYING, stream.write_all(&self.opening(turn)))
            .await
            .ok();
        match self {
            Self::SlowHead | Self::UnreadVisits | Self::UnreadScrapes => {
                drip(&mut stream, b"x", witness).await;
            }
            Self::HalfHead => {
                // It is to be cut without a word.
                if note(&mut stream, witness).await.is_err() {
                    witness.seen().cut += 1;
                }
            }
            Self::SlowBody => {
                // It need not read the body to answer.
                timeout(DRIP, note(&mut stream, witness)).await.ok();
                drip(&mut stream, b"x", witness).await;
            }
            Self::EndlessBody => {
                note(&mut stream, witness).await?;
                drip(&mut stream, b"1\r\nx\r\n", witness).await;
            }
            Self::Idle => {
                note(&mut stream, witness).await?;
                until_closed(&mut stream).await?;
            }
            Self::LongHead
            | Self::ManyFields
            | Self::LongBody
            | Self::AbsurdHeaders
            | Self::InvalidBytes => note(&mut stream, witness).await?,
        }
        Ok(())
    }

    fn reads_nothing(self) -> bool {
        matches!(self, Self::UnreadVisits | Self::UnreadScrapes)
    }

    /// What it begins with, by the number of its turn.
    fn opening(self, turn: usize) -> Vec<u8> {
        let request = |line: &str, fields: &[u8]| {
            let head = format!("{line} HTTP/1.1\r\nhost: chaos\r\n");
            [head.as_bytes(), fields].concat()
        };
        match self {
            Self::SlowHead => request("GET /", b"x-slow: "),
            Self::HalfHead => half_head(),
            Self::SlowBody => request("POST /", b"content-length: 60000\r\n\r\n"),
            Self::EndlessBody => {
                let fields = b"transfer-encoding: chunked\r\n\r\n";
                request("POST /", &[fields, b"1\r\nx\r\n".as_slice()].concat())
            }
            Self::UnreadVisits => request("GET /", b"\r\n").repeat(UNREAD),
            Self::UnreadScrapes => request("GET /metrics", b"\r\n").repeat(UNREAD),
            Self::Idle => request("GET /health/live", b"\r\n"),
            Self::LongHead => {
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

impl Witness {
    fn seen(&self) -> MutexGuard<'_, Sightings> {
        locked(&self.0)
    }
}

/// Of a head that never ends: a little more, and it is refused.
pub(crate) fn half_head() -> Vec<u8> {
    [
        b"GET / HTTP/1.1\r\nhost: chaos\r\nx-half: ",
        &*vec![b'x'; 31 * 1024],
    ]
    .concat()
}

/// A little now and then, until the service closes.
async fn drip(stream: &mut TcpStream, drop: &[u8], witness: &Witness) {
    while stream.write_all(drop).await.is_ok() {
        sleep(DRIP).await;
    }
    witness.seen().cut += 1;
}

/// Reads and says nothing.
async fn until_closed(stream: &mut TcpStream) -> Result<()> {
    let mut rest = [0; 1024];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}

/// Writes down the status of an answer.
async fn note(stream: &mut TcpStream, witness: &Witness) -> Result<()> {
    let mut bytes = [0; 12];
    timeout(Duration::from_secs(5), stream.read_exact(&mut bytes)).await??;
    let status = std::str::from_utf8(&bytes[9..])?.parse()?;
    *witness.seen().answers.entry(status).or_default() += 1;
    Ok(())
}

/// A thread that asks for health.
struct Probes {
    going: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<(Duration, usize)>,
}

const PROBE_EVERY: Duration = Duration::from_millis(50);

impl Probes {
    fn start(address: SocketAddr) -> Self {
        let going = Arc::new(AtomicBool::new(true));
        let goes = Arc::clone(&going);
        let thread = std::thread::spawn(move || {
            let (mut worst, mut failed) = (Duration::ZERO, 0);
            while goes.load(Ordering::Relaxed) {
                for path in ["/health/live", "/health/ready"] {
                    let asked = Instant::now();
                    let answer = client::get(address, path);
                    worst = worst.max(asked.elapsed());
                    failed += usize::from(!answer.is_ok_and(|answer| answer.status == 200));
                }
                std::thread::sleep(PROBE_EVERY);
            }
            (worst, failed)
        });
        Self { going, thread }
    }

    /// The worst latency, and how many failed.
    fn stop(self) -> (Duration, usize) {
        self.going.store(false, Ordering::Relaxed);
        self.thread.join().unwrap_or((Duration::MAX, usize::MAX))
    }
}
