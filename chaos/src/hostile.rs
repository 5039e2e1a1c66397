//! Clients that mean no good, beside some that do: what the latter notice.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bench::client::{Connection, numbers};
use bench::measure::Mebibytes;
use bench::paced::{self, Latency, Pace};
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
    /// A body that comes byte by byte.
    SlowBody,
    /// Many visits in one go, and no answer is read.
    UnreadVisits,
    /// The same with scrapes, which are longer and take more work.
    UnreadScrapes,
    /// Nothing, after one request.
    Idle,
    /// Heads of some hundred kilobytes.
    LongHead,
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
    /// What the attackers were answered, by status, how often.
    pub answers: BTreeMap<u16, usize>,
}

/// What came of all attacks.
#[derive(Clone, Debug)]
pub struct Hostile {
    /// Each attack.
    pub damages: Vec<Damage>,
    /// The most memory that was resident.
    pub memory: Option<Mebibytes>,
    /// What must not be.
    pub complaints: Vec<String>,
}

type Answers = Arc<Mutex<BTreeMap<u16, usize>>>;

/// All attacks, in the report's order.
pub const ALL: [Attack; 9] = [
    Attack::SlowHead,
    Attack::SlowBody,
    Attack::UnreadVisits,
    Attack::UnreadScrapes,
    Attack::Idle,
    Attack::LongHead,
    Attack::LongBody,
    Attack::AbsurdHeaders,
    Attack::InvalidBytes,
];

/// Visits of those who mean well, a second, and how many connections they use.
const GOOD_RATE: f64 = 200.0;
const GOOD_CLIENTS: usize = 8;

/// Between two bytes of whoever is slow.
const DRIP: Duration = Duration::from_millis(200);
/// Between two requests of whoever is not.
const PAUSE: Duration = Duration::from_millis(20);
/// Between two connections that are opened.
const STAGGER: Duration = Duration::from_micros(200);

/// Makes one attack after the other, each so many times for `duration`, with so many idle
/// connections. Others visit meanwhile, and for as long before each.
///
/// # Errors
///
/// If there is no ground, or good visits break off.
pub fn run(rounds: usize, duration: Duration, idle: usize) -> Result<Hostile> {
    // Where that is not enough, attackers have to wait.
    rlimit::increase_nofile_limit(idle as u64 + 2000).ok();
    let ground = Ground::start(Needs::default())?;
    let mut service = Service::new(&ground)?;
    service.start()?;
    service.until_ready()?;
    good(service.address, duration)?;

    let mut damages = Vec::new();
    for attack in ALL {
        let mut damage = Damage::none_of(attack, attack.clients(idle));
        for _ in 0..rounds {
            damage.suffer(&ground, service.address, duration)?;
        }
        damages.push(damage);
    }

    let mut complaints = service.panics();
    let (total, _) = numbers(service.address)?;
    let rows = ground.moments()?.len();
    if usize::try_from(total).ok() != Some(rows) {
        complaints.push(format!("the service says {total} where {rows} rows are"));
    }
    for damage in &damages {
        let allowed = damage.attack.allowed();
        let others = damage
            .answers
            .keys()
            .filter(|status| !allowed.contains(status));
        complaints
            .extend(others.map(|status| format!("{:?} was answered {status}", damage.attack)));
    }
    Ok(Hostile {
        damages,
        memory: service.peak_memory(),
        complaints,
    })
}

/// Visits of those who mean well.
fn good(address: SocketAddr, duration: Duration) -> Result<Latency> {
    paced::run(address, GOOD_CLIENTS, Pace::Constant(GOOD_RATE), duration)
}

impl Damage {
    fn none_of(attack: Attack, clients: usize) -> Self {
        Self {
            attack,
            clients,
            normal_p99: Vec::new(),
            p99: Vec::new(),
            answered: 1.0,
            probe: Duration::ZERO,
            failed_probes: 0,
            answers: BTreeMap::new(),
        }
    }

    /// One round.
    fn suffer(&mut self, ground: &Ground, address: SocketAddr, duration: Duration) -> Result<()> {
        let attack = self.attack;
        self.normal_p99.push(good(address, duration)?.p99);
        let (stop, stopped) = watch::channel(false);
        let answers = Answers::default();
        let attackers: Vec<_> = (0_u32..)
            .take(self.clients)
            .map(|index| {
                let mut stopped = stopped.clone();
                let answers = Arc::clone(&answers);
                ground.runtime.spawn(async move {
                    let stop = async { stopped.wait_for(|stop| *stop).await.map(drop).ok() };
                    let work = async {
                        sleep(STAGGER * index).await;
                        attack.make(address, &answers).await;
                    };
                    tokio::select! {
                        () = work => {}
                        _ = stop => {}
                    }
                })
            })
            .collect();
        std::thread::sleep(STAGGER * u32::try_from(self.clients)?);
        let probes = Probes::start(address);
        let during =
            good(address, duration).with_context(|| format!("good visits beside {attack:?}"))?;
        let (probe, failed_probes) = probes.stop();
        stop.send_replace(true);
        for attacker in attackers {
            ground.runtime.block_on(attacker).ok();
        }
        self.p99.push(during.p99);
        self.answered = self.answered.min(during.answered);
        self.probe = self.probe.max(probe);
        self.failed_probes += failed_probes;
        for (status, times) in &*answers.lock().unwrap_or_else(PoisonError::into_inner) {
            *self.answers.entry(*status).or_default() += times;
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
            Self::LongHead | Self::LongBody | Self::AbsurdHeaders | Self::InvalidBytes => 10,
        }
    }

    /// The statuses that it may be answered with.
    fn allowed(self) -> &'static [u16] {
        match self {
            Self::SlowHead | Self::UnreadVisits | Self::UnreadScrapes => &[],
            Self::SlowBody => &[405],
            Self::Idle | Self::AbsurdHeaders => &[200],
            Self::LongHead => &[431],
            Self::LongBody => &[413],
            Self::InvalidBytes => &[200, 400],
        }
    }

    /// Goes on until it is dropped.
    async fn make(self, address: SocketAddr, answers: &Answers) {
        let mut turn = 0;
        loop {
            // Whatever comes of it is answered, or is not.
            self.strike(address, turn, answers).await.ok();
            turn += 1;
            sleep(PAUSE).await;
        }
    }

    async fn strike(self, address: SocketAddr, turn: usize, answers: &Answers) -> Result<()> {
        match self {
            Self::UnreadVisits => return read_nothing(address, "/").await,
            Self::UnreadScrapes => return read_nothing(address, "/metrics").await,
            _ => {}
        }
        let mut stream = TcpStream::connect(address).await?;
        match self {
            Self::SlowHead => {
                stream
                    .write_all(b"GET / HTTP/1.1\r\nhost: chaos\r\nx-slow: ")
                    .await?;
                drip(&mut stream).await
            }
            Self::SlowBody => {
                stream
                    .write_all(b"POST / HTTP/1.1\r\nhost: chaos\r\ncontent-length: 60000\r\n\r\n")
                    .await?;
                drip(&mut stream).await
            }
            Self::Idle => {
                stream
                    .write_all(b"GET /health/live HTTP/1.1\r\nhost: chaos\r\n\r\n")
                    .await?;
                note(&mut stream, answers).await?;
                let mut rest = [0; 1024];
                while stream.read(&mut rest).await? > 0 {}
                Ok(())
            }
            Self::LongHead => {
                let long = "x".repeat(300_000);
                let head = format!("GET / HTTP/1.1\r\nhost: chaos\r\nx-long: {long}\r\n\r\n");
                // It may be answered before it is read to its end.
                stream.write_all(head.as_bytes()).await.ok();
                note(&mut stream, answers).await
            }
            Self::LongBody => {
                stream
                    .write_all(
                        b"POST / HTTP/1.1\r\nhost: chaos\r\ncontent-length: 104857600\r\n\r\n",
                    )
                    .await?;
                stream.write_all(&vec![b'x'; 64 * 1024]).await.ok();
                note(&mut stream, answers).await
            }
            Self::AbsurdHeaders | Self::InvalidBytes => {
                let headers = self.headers(turn);
                let head: [&[u8]; 3] = [
                    b"GET / HTTP/1.1\r\nhost: chaos\r\nconnection: close\r\n",
                    &headers,
                    b"\r\n\r\n",
                ];
                stream.write_all(&head.concat()).await?;
                note(&mut stream, answers).await
            }
            Self::UnreadVisits | Self::UnreadScrapes => Ok(()),
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

/// A byte now and then, until the service closes.
async fn drip(stream: &mut TcpStream) -> Result<()> {
    loop {
        stream.write_all(b"x").await?;
        sleep(DRIP).await;
    }
}

/// Asks for many answers and leaves them where they are.
async fn read_nothing(address: SocketAddr, path: &str) -> Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4096)?;
    let mut stream = socket.connect(address).await?;
    let requests = format!("GET {path} HTTP/1.1\r\nhost: chaos\r\n\r\n").repeat(100);
    timeout(
        Duration::from_secs(1),
        stream.write_all(requests.as_bytes()),
    )
    .await?
    .ok();
    // Until the service has closed it.
    while stream.write_all(b"x").await.is_ok() {
        sleep(DRIP).await;
    }
    Ok(())
}

/// Writes down the status of an answer.
async fn note(stream: &mut TcpStream, answers: &Answers) -> Result<()> {
    let mut bytes = [0; 12];
    timeout(Duration::from_secs(5), stream.read_exact(&mut bytes)).await??;
    let status = std::str::from_utf8(&bytes[9..])?.parse()?;
    *answers
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .entry(status)
        .or_default() += 1;
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
                    let answer = Connection::open(address).and_then(|mut open| open.get(path));
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
