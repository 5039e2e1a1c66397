//! A relay that delays everything by a constant, as if the stores were in another zone. It knows no
//! protocol and fails nothing: `lab`'s proxy does that, but its delays end at the runtime's next
//! millisecond, and a message waits for the delay of the message before it.
//!
//! It is a process of its own. In each direction of a connection, one thread reads and another
//! writes what is due; a thread's sleep ends within some microseconds.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hdrhistogram::Histogram;
use lab::ports::free_address;
use lab::process::{self, Process};
use lab::program::scratch;
use lab::wait::{SOON, locked, within};

/// A running relay. Dropping it stops the process.
pub(crate) struct Relay {
    /// In the order of the servers.
    pub(crate) addresses: [SocketAddr; 2],
    process: Process,
}

/// How long after they were due messages were sent, in microseconds.
type Lateness = Arc<Mutex<Histogram<u64>>>;

/// What was read at once, and when to write it.
type Message = (Instant, Vec<u8>);

const CHUNK: usize = 64 * 1024;
/// Messages in flight in one direction of one connection: more than any driver sends at once.
const QUEUE: usize = 1024;
const STACK: usize = 64 * 1024;
const REPORT_EVERY: Duration = Duration::from_secs(1);

impl Relay {
    /// Starts one to two servers, with a delay in each direction.
    pub(crate) fn start(servers: [SocketAddr; 2], delay: Duration) -> Result<Self> {
        let addresses = [free_address()?, free_address()?];
        // A network does not wait for a processor, so the relay goes first where that is allowed.
        let first = ["--rr", "1"];
        let allowed = Command::new("chrt").args(first).arg("true").status();
        let mut command = if allowed.is_ok_and(|status| status.success()) {
            let mut command = process::command("chrt");
            command.args(first).arg(std::env::current_exe()?);
            command
        } else {
            process::command(std::env::current_exe()?)
        };
        command
            .arg("relay")
            .arg(delay.as_micros().to_string())
            .args(addresses.map(|address| address.to_string()))
            .args(servers.map(|server| server.to_string()));
        let process = Process::start(command, &scratch()?.join("relay.log"))?;
        let accepts = |address: SocketAddr| TcpStream::connect(address).is_ok();
        ensure!(
            within(SOON, || addresses.iter().all(|&address| accepts(address))),
            "the relay does not listen: {}",
            process.log_tail()
        );
        Ok(Self { addresses, process })
    }

    /// How late its messages were so far, in words.
    pub(crate) fn lateness(&self) -> String {
        self.process.output().pop().unwrap_or_default()
    }
}

/// Relays until the process is stopped. Reports its lateness each second.
pub(crate) fn run(delay: Duration, routes: [(SocketAddr, SocketAddr); 2]) -> Result<()> {
    // Otherwise the system ends a sleep up to 50 µs late, to save power. The threads inherit this.
    std::fs::write("/proc/self/timerslack_ns", "1").ok();
    let lateness = Arc::new(Mutex::new(Histogram::new_with_max(60_000_000, 3)?));
    for (address, server) in routes {
        let listener = TcpListener::bind(address).with_context(|| address.to_string())?;
        let lateness = Arc::clone(&lateness);
        spawn(move || {
            for client in listener.incoming().flatten() {
                // A server that is down refuses the client, too.
                if let Ok(server) = TcpStream::connect(server) {
                    carry(client, server, delay, &lateness).ok();
                }
            }
        })?;
    }
    loop {
        thread::sleep(REPORT_EVERY);
        let lateness = locked(&lateness);
        println!(
            "{} messages, half of them at most {} µs late, 99 % at most {} µs, 99.9 % at most {} µs",
            lateness.len(),
            lateness.value_at_quantile(0.5),
            lateness.value_at_quantile(0.99),
            lateness.value_at_quantile(0.999),
        );
    }
}

/// Carries one connection in threads that end with it.
fn carry(client: TcpStream, server: TcpStream, delay: Duration, lateness: &Lateness) -> Result<()> {
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
    }
    let ways = [(client.try_clone()?, server.try_clone()?), (server, client)];
    for (from, to) in ways {
        let (queue, messages) = sync_channel(QUEUE);
        let lateness = Arc::clone(lateness);
        spawn(move || read(from, &queue, delay))?;
        spawn(move || write(to, messages, &lateness))?;
    }
    Ok(())
}

fn read(mut from: TcpStream, queue: &SyncSender<Message>, delay: Duration) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let due = Instant::now() + delay;
        if queue.send((due, buffer[..length].to_vec())).is_err() {
            return;
        }
    }
}

fn write(mut to: TcpStream, messages: Receiver<Message>, lateness: &Lateness) {
    for (due, bytes) in messages {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let late = u64::try_from(due.elapsed().as_micros()).unwrap_or(u64::MAX);
        if to.write_all(&bytes).is_err() {
            break;
        }
        locked(lateness).saturating_record(late);
    }
    to.shutdown(Shutdown::Write).ok();
}

fn spawn(work: impl FnOnce() + Send + 'static) -> Result<()> {
    Builder::new().stack_size(STACK).spawn(work)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DELAY: Duration = Duration::from_millis(100);

    /// A client and the connection that its server accepts, with a relay in between.
    fn connected() -> (TcpStream, TcpStream) {
        let pair = |listener: &TcpListener| {
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (client, listener.accept().unwrap().0)
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (client, relayed) = pair(&listener);
        let (relay, server) = pair(&listener);
        let lateness = Arc::new(Mutex::new(Histogram::new_with_max(60_000_000, 3).unwrap()));
        carry(relayed, relay, DELAY, &lateness).unwrap();
        (client, server)
    }

    #[test]
    fn messages_are_delayed_alike_however_close_they_follow() {
        let (mut client, mut server) = connected();
        let started = Instant::now();
        let mut byte = [0];
        for number in 1..=5 {
            client.write_all(&[number]).unwrap();
            thread::sleep(DELAY / 10);
        }
        for number in 1..=5 {
            server.read_exact(&mut byte).unwrap();
            assert_eq!(byte, [number]);
        }
        let took = started.elapsed();
        assert!(took >= DELAY * 14 / 10, "{took:?}");
        // Delayed one after the other they would take five delays.
        assert!(took < DELAY * 3, "{took:?}");
    }

    #[test]
    fn end_of_one_direction_leaves_the_other_open() {
        let (mut client, mut server) = connected();
        client.write_all(&[1]).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut received = Vec::new();
        server.read_to_end(&mut received).unwrap();
        server.write_all(&[2]).unwrap();
        drop(server);
        client.read_to_end(&mut received).unwrap();
        assert_eq!(received, [1, 2]);
    }
}
