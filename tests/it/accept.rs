//! The server as its clients see it: its limits, what it serves, and how it stops. It runs in this
//! process, without stores.

use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use axum::{Router, routing::get};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};
use visitas::lifecycle::{Lifecycle, Phase};
use visitas::server::Rejection;
use visitas::server::{self, DrainReport, Events, Limits, Stop};

use crate::support::until_refused;

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
const GET_SLOW: &[u8] = b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n";
const GET_SLOWER: &[u8] = b"GET /slower HTTP/1.1\r\nhost: a\r\n\r\n";
const GET_BIG: &[u8] = b"GET /big HTTP/1.1\r\nhost: a\r\n\r\n";
const HALF: &[u8] = b"GET / HTTP/1.1\r\nho";

/// The timeouts differ by more than `SLACK`, so that a test can tell which of them has passed.
const LIMITS: Limits = Limits {
    max_connections: 1000,
    header_timeout: Duration::from_millis(600),
    idle_timeout: Duration::from_secs(2),
    stall_timeout: Duration::from_millis(1200),
};
/// For tests in which a connection closes for another reason than a timeout.
const NO_TIMEOUT: Limits = Limits {
    max_connections: 1000,
    header_timeout: Duration::from_mins(1),
    idle_timeout: Duration::from_mins(1),
    stall_timeout: Duration::from_mins(1),
};
/// How late a timeout is allowed to be.
const SLACK: Duration = Duration::from_millis(350);
const LONG: Duration = Duration::from_secs(20);

struct Server {
    addr: SocketAddr,
    open: Arc<AtomicUsize>,
    heads: Arc<AtomicUsize>,
    /// Handlers that are running.
    working: Arc<AtomicUsize>,
    rejected: Arc<Mutex<Vec<Rejection>>>,
    lifecycle: Lifecycle,
    done: JoinHandle<DrainReport>,
}

/// A running handler. Dropped when the handler ends or is cancelled.
struct Working(Arc<AtomicUsize>);

impl Drop for Working {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

fn start(limits: Limits, drain: Duration) -> Server {
    let heads = Arc::new(AtomicUsize::new(0));
    let working = Arc::new(AtomicUsize::new(0));
    let after = |pause| {
        let counted = Arc::clone(&heads);
        let working = Arc::clone(&working);
        get(move || async move {
            counted.fetch_add(1, SeqCst);
            working.fetch_add(1, SeqCst);
            let _working = Working(working);
            sleep(pause).await;
            "ok"
        })
    };
    let router = Router::new()
        .route("/", get(|| async { "ok" }).post(|| async { "unread" }))
        .route("/slow", after(Duration::from_millis(50)))
        .route("/slower", after(Duration::from_secs(3)))
        .route("/big", get(big).post(big));
    let listener = server::bind(([127, 0, 0, 1], 0).into(), 1024).expect("bind");
    let addr = listener.local_addr().expect("address");
    let open = Arc::new(AtomicUsize::new(0));
    let rejected = Arc::<Mutex<Vec<Rejection>>>::default();
    let lifecycle = Lifecycle::default();
    let (shown, noted) = (Arc::clone(&open), Arc::clone(&rejected));
    let events = Events {
        connections: Box::new(move |now| shown.store(now, SeqCst)),
        rejected: Box::new(move |reason| noted.lock().expect("whole").push(reason)),
    };
    let stop = Stop {
        lifecycle: lifecycle.clone(),
        leave_at: Phase::Leaving,
        drain_at: Phase::Draining,
        drain,
    };
    let done = tokio::spawn(server::serve(listener, router, limits, events, stop));
    Server {
        addr,
        open,
        heads,
        working,
        rejected,
        lifecycle,
        done,
    }
}

async fn big() -> Vec<u8> {
    vec![b'x'; 32 << 20]
}

impl Server {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.expect("connect")
    }

    async fn until_open(&self, wanted: usize) {
        until_equal(&self.open, wanted).await;
    }

    async fn heads_become(&self, wanted: usize) {
        until_equal(&self.heads, wanted).await;
    }

    fn rejected(&self) -> Vec<Rejection> {
        self.rejected.lock().expect("whole").clone()
    }

    /// Stops the server; returns the result and how long it took.
    async fn stop(self) -> (DrainReport, Duration) {
        let begun = Instant::now();
        self.lifecycle.enter(Phase::Draining);
        let drained = timeout(LONG, self.done)
            .await
            .expect("ends")
            .expect("no panic");
        (drained, begun.elapsed())
    }
}

async fn until_equal(number: &AtomicUsize, wanted: usize) {
    let begun = Instant::now();
    while number.load(SeqCst) != wanted {
        let seen = number.load(SeqCst);
        assert!(begun.elapsed() < LONG, "still {seen}, not {wanted}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// One response, headers and body; `None` if the connection closes first.
async fn response(stream: &mut TcpStream) -> Option<String> {
    let mut text = Vec::new();
    loop {
        let mut byte = [0];
        match timeout(LONG, stream.read(&mut byte))
            .await
            .expect("response")
        {
            Ok(1) => text.push(byte[0]),
            _ => return None,
        }
        if text.ends_with(b"\r\n\r\n") {
            break;
        }
    }
    let mut text = String::from_utf8(text).expect("ASCII");
    let length = text
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .map_or(0, |length| length.parse().expect("a length"));
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    text.push_str(&String::from_utf8_lossy(&body));
    Some(text)
}

/// Sends a request and returns its response.
async fn ask(stream: &mut TcpStream, request: &[u8]) -> Option<String> {
    stream.write_all(request).await.ok()?;
    response(stream).await
}

/// What arrives until the server closes the connection, and how long that took.
async fn rest(stream: &mut TcpStream) -> (String, Duration) {
    let begun = Instant::now();
    let mut bytes = Vec::new();
    let _ = timeout(LONG, stream.read_to_end(&mut bytes))
        .await
        .expect("close");
    (String::from_utf8_lossy(&bytes).into(), begun.elapsed())
}

/// Sends a byte every 50 ms until the server closes the connection, and returns how long that took.
async fn trickle(stream: &mut TcpStream, byte: u8) -> Duration {
    let begun = Instant::now();
    let (mut reader, mut writer) = stream.split();
    let sending = async {
        while writer.write_all(&[byte]).await.is_ok() {
            sleep(Duration::from_millis(50)).await;
        }
    };
    let mut ignored = Vec::new();
    let closed = async {
        let _ = reader.read_to_end(&mut ignored).await;
    };
    timeout(LONG, async {
        tokio::select! { () = sending => {}, () = closed => {} }
    })
    .await
    .expect("close");
    begun.elapsed()
}

#[track_caller]
fn near(took: Duration, limit: Duration) {
    let early = Duration::from_millis(20);
    assert!(
        took + early >= limit && took <= limit + SLACK,
        "took {took:?}, not about {limit:?}"
    );
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn silent_connection_is_closed_at_the_idle_timeout() {
    let server = start(LIMITS, LONG);
    let (said, took) = rest(&mut server.connect().await).await;
    assert_eq!(said, "");
    near(took, LIMITS.idle_timeout);
    server.until_open(0).await;
    assert_eq!(server.rejected(), []);
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn header_timeout_starts_at_the_first_byte_and_trickling_gains_no_time() {
    let server = start(LIMITS, LONG);
    let mut stream = server.connect().await;
    sleep(LIMITS.header_timeout * 2).await;
    stream.write_all(HALF).await.expect("send");
    near(trickle(&mut stream, b'x').await, LIMITS.header_timeout);
    server.until_open(0).await;
    assert_eq!(server.rejected(), [Rejection::HeaderTimeout]);
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn header_timeout_of_a_later_request_starts_at_its_first_byte() {
    let server = start(LIMITS, LONG);
    let mut stream = server.connect().await;
    ask(&mut stream, GET).await.expect("response");
    sleep(LIMITS.header_timeout * 2).await;
    stream.write_all(HALF).await.expect("send");
    near(trickle(&mut stream, b'x').await, LIMITS.header_timeout);
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn header_timeout_of_a_pipelined_request_starts_at_the_previous_response() {
    let server = start(LIMITS, LONG);
    let mut stream = server.connect().await;
    stream.write_all(GET_SLOW).await.expect("send");
    server.heads_become(1).await;
    stream.write_all(HALF).await.expect("send");
    response(&mut stream).await.expect("response");
    near(rest(&mut stream).await.1, LIMITS.header_timeout);
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn header_timeout_of_headers_in_the_same_packet_starts_at_the_previous_response() {
    let server = start(LIMITS, LONG);
    let mut stream = server.connect().await;
    ask(&mut stream, &[GET, HALF].concat())
        .await
        .expect("response");
    near(rest(&mut stream).await.1, LIMITS.header_timeout);
}

/// A packet can end anywhere in the empty line that ends the headers.
#[tokio::test]
async fn connection_is_idle_after_a_request_whose_headers_came_in_pieces() {
    let server = start(LIMITS, LONG);
    for pieces in [2, 3, 4, 20] {
        let mut stream = server.connect().await;
        let (first, last) = GET.split_at(GET.len() - pieces);
        stream.write_all(first).await.expect("send");
        for &byte in last {
            sleep(Duration::from_millis(5)).await;
            stream.write_all(&[byte]).await.expect("send");
        }
        response(&mut stream).await.expect("response");
        sleep(LIMITS.header_timeout + SLACK).await;
        ask(&mut stream, GET).await.expect("response");
    }
    assert_eq!(server.rejected(), []);
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn idle_connection_outlives_the_header_timeout_and_ends_at_the_idle_timeout() {
    let server = start(LIMITS, LONG);
    let mut stream = server.connect().await;
    for _ in 0..2 {
        ask(&mut stream, GET).await.expect("response");
        sleep(LIMITS.idle_timeout * 2 / 3).await;
    }
    ask(&mut stream, GET).await.expect("response");
    near(rest(&mut stream).await.1, LIMITS.idle_timeout);
}

#[tokio::test]
async fn handler_can_run_longer_than_every_timeout() {
    let server = start(LIMITS, LONG);
    let mut stream = server.connect().await;
    ask(&mut stream, GET_SLOWER).await.expect("response");
    ask(&mut stream, GET).await.expect("response");
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn unread_body_does_not_hold_the_connection() {
    let server = start(LIMITS, LONG);
    let mut stream = server.connect().await;
    let head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 8\r\n\r\n";
    stream.write_all(head).await.expect("send");
    let (said, took) = rest(&mut stream).await;
    assert!(said.ends_with("unread"), "{said}");
    assert!(said.contains("\r\nconnection: close\r\n"), "{said}");
    near(took, Duration::ZERO);
}

#[tokio::test]
async fn response_to_a_request_with_a_large_unread_body_arrives() {
    let server = start(LIMITS, LONG);
    for _ in 0..20 {
        let stream = server.connect().await;
        let (mut reader, mut writer) = stream.into_split();
        let length = 4 << 20;
        let head = format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n");
        writer.write_all(head.as_bytes()).await.expect("send");
        writer.write_all(&vec![b'x'; length]).await.expect("send");
        let mut said = String::new();
        reader.read_to_string(&mut said).await.expect("response");
        assert!(said.ends_with("unread"), "{said}");
    }
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn unread_body_that_never_ends_is_cut_after_a_second() {
    let server = start(LIMITS, LONG);
    let mut stream = server.connect().await;
    let head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n";
    stream.write_all(head).await.expect("send");
    server.until_open(1).await;
    let begun = Instant::now();
    while server.open.load(SeqCst) == 1 && begun.elapsed() < LONG {
        let _ = stream.write_all(b"x").await;
        sleep(Duration::from_millis(20)).await;
    }
    near(begun.elapsed(), Duration::from_secs(1));
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn request_with_a_body_is_the_last_of_its_connection_and_its_response_says_so() {
    let server = start(LIMITS, LONG);
    for body in [
        "content-length: 4\r\n\r\nbody",
        "content-length: 4\r\n\r\n",
        "transfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
        "transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "expect: 100-continue\r\ncontent-length: 4\r\n\r\n",
    ] {
        let mut stream = server.connect().await;
        let request = format!("POST / HTTP/1.1\r\nhost: a\r\n{body}");
        stream.write_all(request.as_bytes()).await.expect("send");
        let (said, took) = rest(&mut stream).await;
        assert!(said.starts_with("HTTP/1.1 200 "), "{said}");
        assert!(said.contains("\r\nconnection: close\r\n"), "{said}");
        near(took, Duration::ZERO);
    }
    let mut stream = server.connect().await;
    let empty = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n";
    let said = ask(&mut stream, empty).await.expect("response");
    assert!(!said.contains("connection: close"), "{said}");
    ask(&mut stream, GET).await.expect("response");
    assert_eq!(server.rejected(), []);
}

#[tokio::test]
async fn client_that_shuts_down_its_sending_side_gets_its_response() {
    let server = start(LIMITS, LONG);
    let with_body = b"POST /big HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nbody";
    for (request, least, times) in [
        (GET, 2, 50),
        (GET_SLOW, 2, 10),
        (GET_BIG, 32 << 20, 2),
        (with_body, 32 << 20, 2),
    ] {
        for _ in 0..times {
            let mut stream = server.connect().await;
            stream.write_all(request).await.expect("send");
            stream.shutdown().await.expect("shutdown");
            let (said, _) = rest(&mut stream).await;
            assert!(said.starts_with("HTTP/1.1 200 "), "{said:.100}");
            assert!(said.len() > least, "{}", said.len());
        }
    }
    server.until_open(0).await;
    assert_eq!(server.rejected(), []);
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn reset_cancels_the_running_handler() {
    let server = start(LIMITS, LONG);
    let mut stream = server.connect().await;
    stream.write_all(GET_SLOWER).await.expect("send");
    until_equal(&server.working, 1).await;
    stream.set_zero_linger().expect("option");
    let begun = Instant::now();
    drop(stream);
    until_equal(&server.working, 0).await;
    near(begun.elapsed(), Duration::ZERO);
    server.until_open(0).await;
}

async fn connect_with_small_window(server: &Server) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("socket");
    socket.set_recv_buffer_size(4096).expect("option");
    socket.connect(server.addr).await.expect("connect")
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn client_that_does_not_read_is_disconnected_at_the_stall_timeout() {
    let server = start(LIMITS, LONG);
    let mut stream = connect_with_small_window(&server).await;
    stream.write_all(GET_BIG).await.expect("send");
    server.until_open(1).await;
    let begun = Instant::now();
    server.until_open(0).await;
    near(begun.elapsed(), LIMITS.stall_timeout);
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn client_that_sends_without_reading_is_disconnected_at_the_stall_timeout() {
    let server = start(LIMITS, LONG);
    let mut stream = connect_with_small_window(&server).await;
    let post = b"POST /big HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n";
    stream.write_all(post).await.expect("send");
    server.until_open(1).await;
    let begun = Instant::now();
    while server.open.load(SeqCst) == 1 && begun.elapsed() < LONG {
        let _ = stream.write_all(b"x").await;
        sleep(Duration::from_millis(20)).await;
    }
    near(begun.elapsed(), LIMITS.stall_timeout);
}

#[tokio::test]
async fn client_that_reads_slowly_gets_everything() {
    let server = start(LIMITS, LONG);
    let mut stream = server.connect().await;
    stream.write_all(GET_BIG).await.expect("send");
    let begun = Instant::now();
    let mut buffer = vec![0; 64 << 10];
    let mut got = 0;
    while got < 32 << 20 {
        got += stream.read(&mut buffer).await.expect("bytes");
        sleep(Duration::from_millis(3)).await;
    }
    assert!(begun.elapsed() > LIMITS.stall_timeout);
}

#[tokio::test]
async fn connection_beyond_the_limit_evicts_the_one_idle_longest() {
    let limits = Limits {
        max_connections: 3,
        ..NO_TIMEOUT
    };
    let server = start(limits, LONG);
    let mut used_again = server.connect().await;
    ask(&mut used_again, GET).await.expect("response");
    let mut idle_longest = server.connect().await;
    ask(&mut idle_longest, GET).await.expect("response");
    let mut silent = server.connect().await;
    server.until_open(3).await;
    ask(&mut used_again, GET).await.expect("response");
    let mut kept = Vec::new();
    for evicted in [&mut idle_longest, &mut silent] {
        let mut new = server.connect().await;
        ask(&mut new, GET).await.expect("response");
        assert_eq!(rest(evicted).await.0, "");
        assert_eq!(server.open.load(SeqCst), 3);
        kept.push(new);
    }
    ask(&mut used_again, GET).await.expect("response");
}

#[tokio::test]
async fn connection_beyond_the_limit_waits_while_none_is_idle() {
    let limits = Limits {
        max_connections: 2,
        ..LIMITS
    };
    let server = start(limits, LONG);
    let mut busy = [server.connect().await, server.connect().await];
    for stream in &mut busy {
        stream.write_all(GET_SLOWER).await.expect("send");
    }
    server.heads_become(2).await;
    let mut third = server.connect().await;
    third.write_all(GET).await.expect("send");
    let early = timeout(Duration::from_millis(200), response(&mut third)).await;
    assert!(early.is_err());
    assert_eq!(server.open.load(SeqCst), 2);
    response(&mut third).await.expect("response");
    // The third was served once one of the two had its response.
    for stream in &mut busy {
        response(stream).await.expect("response");
    }
}

/// The request is in the kernel when the server looks for a connection to evict.
#[tokio::test]
async fn connection_with_an_unread_request_is_not_evicted() {
    let limits = Limits {
        max_connections: 1,
        ..LIMITS
    };
    let server = start(limits, LONG);
    for _ in 0..50 {
        let mut idle = server.connect().await;
        ask(&mut idle, GET).await.expect("response");
        let other = std::net::TcpStream::connect(server.addr).expect("connect");
        assert_eq!(idle.try_write(GET).expect("send"), GET.len());
        response(&mut idle).await.expect("response");
        drop((idle, other));
    }
}

#[tokio::test]
async fn open_connections_are_reported() {
    let server = start(LIMITS, LONG);
    let streams = [server.connect().await, server.connect().await];
    server.until_open(2).await;
    drop(streams);
    server.until_open(0).await;
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn pipelined_requests_are_answered_in_order() {
    let server = start(LIMITS, LONG);
    let mut stream = server.connect().await;
    let unknown = b"GET /unknown HTTP/1.1\r\nhost: a\r\n\r\n";
    let requests = [GET, GET_SLOW, unknown].concat().repeat(40);
    stream.write_all(&requests).await.expect("send");
    for _ in 0..40 {
        for status in ["200", "200", "404"] {
            let response = response(&mut stream).await.expect("response");
            assert_eq!(&response[9..12], status);
        }
    }
    near(rest(&mut stream).await.1, LIMITS.idle_timeout);
}

#[tokio::test]
async fn http_2_is_refused_and_closed() {
    let server = start(NO_TIMEOUT, LONG);
    let mut stream = server.connect().await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    stream.write_all(preface).await.expect("send");
    assert_eq!(rest(&mut stream).await.0, "");
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn half_an_http_2_preface_is_closed_at_the_header_timeout() {
    let server = start(LIMITS, LONG);
    let mut stream = server.connect().await;
    stream.write_all(b"PRI * HT").await.expect("send");
    near(rest(&mut stream).await.1, LIMITS.header_timeout);
}

#[tokio::test]
async fn malformed_headers_are_answered_400_and_headers_too_large_431() {
    let server = start(LIMITS, LONG);
    let mut stream = server.connect().await;
    let said = ask(&mut stream, b"GET / HTTP/1.1\r\nno colon\r\n\r\n").await;
    assert_eq!(&said.expect("response")[9..12], "400");
    let mut stream = server.connect().await;
    let long = format!("GET / HTTP/1.1\r\na: {}\r\n\r\n", "x".repeat(300 << 10));
    let said = ask(&mut stream, long.as_bytes()).await;
    assert_eq!(&said.expect("response")[9..12], "431");
}

#[tokio::test]
async fn http_1_0_is_answered_and_closed() {
    let server = start(NO_TIMEOUT, LONG);
    let mut stream = server.connect().await;
    stream
        .write_all(b"GET / HTTP/1.0\r\n\r\n")
        .await
        .expect("send");
    let (said, _) = rest(&mut stream).await;
    assert!(
        said.starts_with("HTTP/1.0 200") && said.ends_with("ok"),
        "{said}"
    );
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn stop_closes_idle_and_silent_connections_after_a_second_and_refuses_new_ones() {
    let server = start(LIMITS, LONG);
    let addr = server.addr;
    let mut idle = server.connect().await;
    ask(&mut idle, GET).await.expect("response");
    let mut silent = server.connect().await;
    server.until_open(2).await;
    let (drained, took) = server.stop().await;
    assert_eq!(drained, DrainReport { aborted: 0 });
    near(took, Duration::from_secs(1));
    assert_eq!(rest(&mut idle).await.0, "");
    assert_eq!(rest(&mut silent).await.0, "");
    until_refused(addr).await;
}

#[tokio::test]
async fn new_connections_are_refused_while_requests_in_flight_are_answered() {
    let server = start(LIMITS, LONG);
    let addr = server.addr;
    let mut stream = server.connect().await;
    stream.write_all(GET_SLOWER).await.expect("send");
    server.heads_become(1).await;
    let stopping = tokio::spawn(server.stop());
    until_refused(addr).await;
    assert!(!stopping.is_finished());
}

#[tokio::test]
async fn request_in_flight_at_the_stop_is_answered_with_close() {
    let server = start(LIMITS, LONG);
    let mut stream = server.connect().await;
    stream.write_all(GET_SLOWER).await.expect("send");
    server.heads_become(1).await;
    let (drained, _) = server.stop().await;
    assert_eq!(drained, DrainReport { aborted: 0 });
    let (said, _) = rest(&mut stream).await;
    assert!(
        said.contains("connection: close") && said.ends_with("ok"),
        "{said}"
    );
}

#[tokio::test]
async fn responses_before_the_stop_keep_the_connection() {
    let server = start(LIMITS, LONG);
    let said = ask(&mut server.connect().await, GET)
        .await
        .expect("response");
    assert!(!said.contains("connection: close"), "{said}");
}

#[tokio::test]
async fn while_leaving_responses_say_close_and_new_connections_are_accepted() {
    let server = start(LIMITS, LONG);
    let mut idle = server.connect().await;
    ask(&mut idle, GET).await.expect("response");
    let mut busy = server.connect().await;
    busy.write_all(GET_SLOW).await.expect("send");
    server.heads_become(1).await;
    server.lifecycle.enter(Phase::Leaving);
    let said = response(&mut busy).await.expect("response");
    assert!(said.contains("\r\nconnection: close\r\n"), "{said}");
    assert_eq!(rest(&mut busy).await.0, "");
    for stream in [&mut idle, &mut server.connect().await] {
        let said = ask(stream, GET).await.expect("response");
        assert!(said.contains("\r\nconnection: close\r\n"), "{said}");
        assert_eq!(rest(stream).await.0, "");
    }
    let mut kept = server.connect().await;
    sleep(Duration::from_millis(1500)).await;
    ask(&mut kept, GET).await.expect("response");
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn while_draining_an_idle_connection_is_served_for_a_second() {
    let server = start(LIMITS, LONG);
    let mut early = server.connect().await;
    let mut late = server.connect().await;
    for stream in [&mut early, &mut late] {
        ask(stream, GET).await.expect("response");
    }
    let stopping = tokio::spawn(server.stop());
    sleep(Duration::from_millis(100)).await;
    let said = ask(&mut early, GET).await.expect("response");
    assert!(said.contains("\r\nconnection: close\r\n"), "{said}");
    drop(early);
    sleep(Duration::from_millis(600)).await;
    ask(&mut late, GET_SLOW).await.expect("response");
    drop(late);
    let (drained, took) = stopping.await.expect("the stop");
    assert_eq!(drained, DrainReport { aborted: 0 });
    assert!(took < Duration::from_secs(1), "{took:?}");
}

/// The client has sent more requests by the time it reads `Connection: close`. Closing a connection
/// with unread bytes resets it, and a reset must not destroy the response.
#[tokio::test]
async fn last_response_arrives_although_the_client_has_sent_more() {
    let server = start(LIMITS, LONG);
    server.lifecycle.enter(Phase::Leaving);
    for _ in 0..50 {
        let mut stream = server.connect().await;
        stream.write_all(GET_SLOW).await.expect("send");
        sleep(Duration::from_millis(20)).await;
        stream.write_all(&GET.repeat(3000)).await.expect("send");
        let said = response(&mut stream).await.expect("response");
        assert!(said.contains("\r\nconnection: close\r\n"), "{said}");
    }
}

/// The test has one thread, so nothing runs between the client's writes and the stop: the requests
/// are in the kernel, and the server has not read them.
#[tokio::test]
async fn request_that_is_unread_at_the_stop_is_answered() {
    let server = start(LIMITS, LONG);
    let mut used = server.connect().await;
    ask(&mut used, GET).await.expect("response");
    let mut fresh = server.connect().await;
    server.until_open(2).await;
    assert_eq!(used.try_write(GET).expect("send"), GET.len());
    assert_eq!(fresh.try_write(GET).expect("send"), GET.len());
    let _ = server.stop().await;
    for stream in [&mut used, &mut fresh] {
        let said = response(stream).await.expect("response");
        assert!(said.contains("connection: close"), "{said}");
    }
}

#[tokio::test]
async fn backlog_at_the_stop_is_served() {
    let limits = Limits {
        max_connections: 1,
        ..LIMITS
    };
    let server = start(limits, LONG);
    let mut held = server.connect().await;
    ask(&mut held, GET).await.expect("response");
    let mut waiting = Vec::new();
    for _ in 0..8 {
        let mut stream = server.connect().await;
        stream.write_all(GET).await.expect("send");
        waiting.push(stream);
    }
    let (drained, _) = server.stop().await;
    assert_eq!(drained, DrainReport { aborted: 0 });
    for stream in &mut waiting {
        response(stream).await.expect("response");
    }
}

/// The connection is in the backlog when the stop begins: std's `connect` does not yield to the
/// server, which runs on the same thread.
#[tokio::test]
async fn connection_not_yet_accepted_at_the_stop_is_served() {
    let server = start(LIMITS, LONG);
    let mut known = server.connect().await;
    ask(&mut known, GET).await.expect("response");
    let unseen = std::net::TcpStream::connect(server.addr).expect("connect");
    let stopping = tokio::spawn(server.stop());
    // The request is sent after the stop has begun.
    sleep(Duration::from_millis(30)).await;
    unseen.set_nonblocking(true).expect("option");
    let mut unseen = TcpStream::from_std(unseen).expect("stream");
    ask(&mut unseen, GET).await.expect("response");
    let _ = stopping.await.expect("the stop");
}

/// One visit on a new connection: whether it was answered, or `None` if the connection is refused.
fn visit_on_a_new_connection(addr: SocketAddr) -> Option<bool> {
    let mut stream =
        std::net::TcpStream::connect_timeout(&addr, Duration::from_millis(100)).ok()?;
    let mut said = String::new();
    let sent = stream.write_all(GET);
    Some(sent.is_ok() && stream.read_to_string(&mut said).is_ok() && said.ends_with("ok"))
}

/// Between the last accept and the close of the listener the kernel must not accept a connection:
/// closing the listener would reset it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_connection_that_the_kernel_accepts_during_a_stop_is_served() {
    let mut visits = 0;
    for _ in 0..40 {
        let server = start(LIMITS, LONG);
        // Responses say close, so each visit opens a connection.
        server.lifecycle.enter(Phase::Leaving);
        let addr = server.addr;
        let clients: Vec<_> = (0..8)
            .map(|_| {
                std::thread::spawn(move || {
                    let visits = std::iter::from_fn(|| visit_on_a_new_connection(addr));
                    visits.take(100_000).collect::<Vec<_>>()
                })
            })
            .collect();
        sleep(Duration::from_millis(20)).await;
        let (drained, _) = server.stop().await;
        assert_eq!(drained, DrainReport { aborted: 0 });
        for client in clients {
            let answered = client.join().expect("no panic");
            assert!(answered.iter().all(|&answered| answered));
            visits += answered.len();
        }
    }
    assert!(visits > 1000, "{visits}");
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn half_sent_headers_delay_a_stop_by_the_header_timeout_at_most() {
    let server = start(LIMITS, LONG);
    let mut stream = server.connect().await;
    let begun = Instant::now();
    stream.write_all(HALF).await.expect("send");
    sleep(LIMITS.header_timeout / 2).await;
    let (drained, _) = server.stop().await;
    assert_eq!(drained, DrainReport { aborted: 0 });
    near(begun.elapsed(), LIMITS.header_timeout);
}

#[tokio::test]
async fn half_sent_headers_that_complete_during_the_stop_are_answered() {
    let server = start(LIMITS, LONG);
    let mut stream = server.connect().await;
    ask(&mut stream, GET).await.expect("response");
    stream.write_all(HALF).await.expect("send");
    sleep(Duration::from_millis(20)).await;
    let stopping = tokio::spawn(server.stop());
    sleep(Duration::from_millis(200)).await;
    stream.write_all(b"st: a\r\n\r\n").await.expect("send");
    assert!(
        response(&mut stream)
            .await
            .expect("response")
            .contains("connection: close")
    );
    let _ = stopping.await.expect("the stop");
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn requests_open_at_the_drain_deadline_are_aborted_and_counted() {
    let drain = Duration::from_millis(150);
    let server = start(LIMITS, drain);
    let mut half = server.connect().await;
    half.write_all(HALF).await.expect("send");
    let mut slow = server.connect().await;
    slow.write_all(GET_SLOWER).await.expect("send");
    let mut idle = server.connect().await;
    ask(&mut idle, GET).await.expect("response");
    server.until_open(3).await;
    let open = Arc::clone(&server.open);
    let (drained, took) = server.stop().await;
    assert_eq!(drained, DrainReport { aborted: 2 });
    near(took, drain);
    assert_eq!(open.load(SeqCst), 0);
    assert_eq!(rest(&mut half).await.0, "");
    assert_eq!(rest(&mut slow).await.0, "");
}

#[tokio::test]
#[ignore = "reads a clock: make faults"]
async fn stop_with_a_drain_of_zero_aborts_at_once() {
    let server = start(LIMITS, Duration::ZERO);
    let _idle = server.connect().await;
    server.until_open(1).await;
    let (_, took) = server.stop().await;
    near(took, Duration::ZERO);
}

/// Sends requests until a response says close; returns the number of responses, and whether one
/// said close.
async fn busy_client(mut stream: TcpStream) -> (usize, bool) {
    let mut responses = 0;
    while let Some(said) = ask(&mut stream, GET_SLOW).await {
        assert!(
            said.starts_with("HTTP/1.1 200") && said.ends_with("ok"),
            "{said}"
        );
        responses += 1;
        if said.contains("connection: close") {
            return (responses, true);
        }
    }
    (responses, false)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "reads a clock: make faults"]
async fn stop_under_load_answers_every_request_it_read_and_aborts_no_busy_client() {
    let server = start(LIMITS, LONG);
    let heads = Arc::clone(&server.heads);
    let mut clients = JoinSet::new();
    for _ in 0..64 {
        clients.spawn(busy_client(server.connect().await));
    }
    while heads.load(SeqCst) < 300 {
        sleep(Duration::from_millis(5)).await;
    }
    let (drained, took) = server.stop().await;
    let ends = clients.join_all().await;
    assert_eq!(drained, DrainReport { aborted: 0 });
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert_eq!(
        ends.iter().map(|end| end.0).sum::<usize>(),
        heads.load(SeqCst)
    );
    assert!(ends.iter().all(|end| end.1));
}

#[tokio::test]
async fn address_in_use_is_named_in_the_error() {
    let taken = server::bind(([127, 0, 0, 1], 0).into(), 1).expect("bind");
    let addr = taken.local_addr().expect("address");
    let error = server::bind(addr, 1).expect_err("taken");
    assert!(error.to_string().contains(&addr.to_string()), "{error}");
}
