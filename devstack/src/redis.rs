//! A Redis without persistence, unless its settings enable it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use rustix::process::Signal;

use crate::place::{self, Data, Home, Port};
use crate::server::{Definition, Server};
use crate::supervise::Supervisor;
use crate::{find, tls};

/// The options of a Redis. The default is temporary, on a free port, without password or TLS.
#[derive(Clone, Debug, Default)]
pub struct RedisOptions {
    /// The location of its files, if its settings make it write any.
    pub data: Data,
    /// The port; 0 chooses a free one.
    pub port: u16,
    /// Settings of `redis.conf`, such as `("maxmemory", "10mb")`. The last value of a name wins,
    /// also over the defaults here.
    pub config: Vec<(String, String)>,
    /// The password that clients must send.
    pub password: Option<String>,
    /// Whether its port accepts TLS only.
    pub tls: bool,
}

/// A Redis on 127.0.0.1. See [`Server`] for its lifetime.
pub struct Redis {
    server: Server,
    password: Option<String>,
    ca: Option<PathBuf>,
    /// Keeps the port reserved.
    _plain: Port,
}

impl Redis {
    /// Starts a Redis and returns once it responds.
    ///
    /// # Errors
    ///
    /// When no server is installed (the error says how to install one), the data is in use, or the
    /// server does not start (the error contains the end of its log).
    pub fn start(options: RedisOptions) -> Result<Self> {
        let program = find::redis()?.path;
        let home = Home::open(options.data)?;
        let supervisor = Supervisor::for_home(&home)?;
        let data = home.path.join("redis");
        place::create_owned(&data)?;
        let port = Port::reserve(options.port)?;
        let mut settings: Vec<(String, String)> = vec![
            ("bind".into(), "127.0.0.1".into()),
            ("save".into(), String::new()),
            ("appendonly".into(), "no".into()),
            ("dir".into(), data.display().to_string()),
        ];
        let mut ca = None;
        // A second port without TLS serves the readiness check.
        let plain = Port::reserve(if options.tls { 0 } else { port.number })?;
        settings.push(("port".into(), plain.number.to_string()));
        if options.tls {
            let files = tls::Files::generate(&home)?;
            settings.extend([
                ("tls-port".into(), port.number.to_string()),
                (
                    "tls-cert-file".into(),
                    files.certificate.display().to_string(),
                ),
                ("tls-key-file".into(), files.key.display().to_string()),
                ("tls-ca-cert-file".into(), files.ca.display().to_string()),
                ("tls-auth-clients".into(), "no".into()),
            ]);
            ca = Some(files.ca);
        }
        settings.extend(
            options
                .password
                .iter()
                .map(|password| ("requirepass".into(), password.clone())),
        );
        settings.extend(options.config);
        let mut command = vec![program.display().to_string()];
        command.extend(
            settings
                .into_iter()
                .flat_map(|(name, value)| [format!("--{name}"), value]),
        );

        let password = options.password.clone();
        let number = plain.number;
        let is_ready = move |pid| process_behind(number, password.as_deref()) == Some(pid);
        let definition = Definition {
            command,
            is_ready: Box::new(is_ready),
            stop_signal: Signal::TERM,
        };
        Ok(Self {
            server: Server::start(home, port, supervisor, definition)?,
            password: options.password,
            ca,
            _plain: plain,
        })
    }

    /// Its address: `redis://host:port`, `rediss://` with TLS, and with `:password@` if it has one.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.ca.is_some() { "rediss" } else { "redis" };
        let password = self
            .password
            .as_ref()
            .map(|password| format!(":{password}@"))
            .unwrap_or_default();
        format!("{scheme}://{password}{}:{}", self.host(), self.port())
    }

    /// The certificate, in PEM, that a client must trust; `None` without TLS.
    #[must_use]
    pub fn ca(&self) -> Option<&Path> {
        self.ca.as_deref()
    }
}

impl Deref for Redis {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

/// The id of the Redis process that responds on this port.
fn process_behind(port: u16, password: Option<&str>) -> Option<u32> {
    let authenticate = password
        .map(|password| format!("*2\r\n$4\r\nAUTH\r\n${}\r\n{password}\r\n", password.len()))
        .unwrap_or_default();
    let requests = authenticate + "INFO server\r\nQUIT\r\n";
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
    stream.write_all(requests.as_bytes()).ok()?;
    let mut replies = String::new();
    stream.read_to_string(&mut replies).ok()?;
    replies
        .lines()
        .find_map(|line| line.strip_prefix("process_id:"))?
        .parse()
        .ok()
}
