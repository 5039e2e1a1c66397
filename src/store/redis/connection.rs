//! Opens a connection to Redis and logs in, with the secrets and certificates that the files hold
//! at that moment.
//!
//! Must not know: the counter.

use std::sync::Arc;

use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, Cmd, ConnectionAddr, FromRedisValue,
    IntoConnectionInfo, RedisConnectionInfo, RedisError, TlsCertificates,
};
use tokio::time::{Instant, timeout_at};

use super::error::Peer;
use crate::config::{Credentials, RedisConfig};
use crate::store::call::Operation;
use crate::store::error::{Cause, Error};
use crate::store::files::{Files, unread};
use crate::store::pool::Connect;

static PING: Operation = Operation::command("PING");

/// The share of a call's timeout after which an attempt to open a connection ends, so that its
/// error, which says what was tried, comes before the call's own.
const SHARE: f64 = 0.95;

/// How to open a connection.
pub(super) struct Opener {
    config: Arc<RedisConfig>,
    files: Files,
    driver: AsyncConnectionConfig,
}

/// A connection that has logged in.
pub(super) struct Session {
    connection: MultiplexedConnection,
    peer: Peer,
}

type Login = Credentials<Option<String>>;

impl Opener {
    pub(super) fn new(config: &RedisConfig) -> anyhow::Result<Self> {
        // A certificate that cannot be used ends the program at its start.
        client(config).map_err(anyhow::Error::msg)?;
        Ok(Self {
            config: Arc::new(config.clone()),
            files: Files::default(),
            // Without the driver's own timeouts: each call has one deadline, checkout included.
            driver: AsyncConnectionConfig::new()
                .set_connection_timeout(None)
                .set_response_timeout(None),
        })
    }

    async fn read_files(&self) -> Result<(Client, Login), Error> {
        let config = Arc::clone(&self.config);
        let read = move || Ok((client(&config)?, config.credentials()?));
        let read = self.files.read(read).await;
        read.map_err(|error| self.peer(&self.first_login()).obstacle(error))
    }

    async fn open_and_log_in(&self, client: Client, login: Login) -> Result<Session, Error> {
        let peer = self.peer(&login);
        let refused = |error: RedisError| peer.login_failure(&error);
        let mut connection = client
            .get_multiplexed_async_connection_with_config(&self.driver)
            .await
            .map_err(refused)?;
        self.log_in(&mut connection, &login)
            .await
            .map_err(refused)?;
        Ok(Session { connection, peer })
    }

    /// Logs in, which takes one round trip even without a password: every reason why a connection
    /// cannot be used is found here. The driver could log in, but drops the server's reason.
    async fn log_in(
        &self,
        connection: &mut MultiplexedConnection,
        login: &Login,
    ) -> Result<(), RedisError> {
        let mut command = redis::cmd("PING");
        if login.user.is_some() || login.password.is_some() {
            command = redis::cmd("AUTH");
            command.arg(login.user.as_deref());
            // A user without a password logs in with any.
            command.arg(
                login
                    .password
                    .as_ref()
                    .map_or("", |password| password.expose()),
            );
        }
        answered(command.query_async(connection).await)?;
        if self.config.database != 0 {
            let mut select = redis::cmd("SELECT");
            select.arg(self.config.database);
            select.query_async::<()>(connection).await?;
        }
        Ok(())
    }

    /// The login at the start, for an attempt that ends before the files are read.
    fn first_login(&self) -> Login {
        Login {
            user: self.config.redis_username.clone(),
            password: self.config.redis_password.clone(),
        }
    }

    fn peer(&self, login: &Login) -> Peer {
        let user = match (&login.user, &login.password) {
            (Some(user), _) => format!("as {user}"),
            (None, Some(_)) => "with a password".to_owned(),
            (None, None) => "without a password".to_owned(),
        };
        let config = &self.config;
        let (host, port) = (&config.redis_host, config.redis_port);
        let is_socket = host.starts_with('/');
        let place = if is_socket {
            host.clone()
        } else if host.contains(':') {
            format!("[{host}]:{port}")
        } else {
            format!("{host}:{port}")
        };
        let tls = if config.tls { "with" } else { "without" };
        Peer {
            description: format!("{user} at {place}, {tls} TLS"),
            is_encrypted: config.tls,
            is_socket,
        }
    }
}

impl Connect for Opener {
    type Connection = Session;

    const PING: &'static Operation = &PING;

    async fn open(&self) -> Result<Session, Error> {
        let timeout = self.config.redis_timeout.mul_f64(SHARE);
        let deadline = Instant::now() + timeout;
        let Ok(read) = timeout_at(deadline, self.read_files()).await else {
            let why = Cause::from(unread(&self.config.files()));
            return Err(Error::NoSession(timeout, why));
        };
        let (client, login) = read?;
        let peer = self.peer(&login);
        let opening = timeout_at(deadline, self.open_and_log_in(client, login)).await;
        opening.unwrap_or_else(|_| {
            let (description, check) = (&peer.description, peer.check_of_silence());
            let why = Cause::from(format!("no answer; tried {description}; {check}"));
            Err(Error::NoSession(timeout, why))
        })
    }

    async fn ping(session: &mut Session) -> Result<(), Error> {
        let reply = redis::cmd("PING")
            .query_async(&mut session.connection)
            .await;
        answered(reply).map_err(|error| session.peer.failure(&error))
    }
}

impl Session {
    /// Sends a command and reads its reply.
    pub(super) async fn send<T: FromRedisValue>(&mut self, command: &Cmd) -> Result<T, Error> {
        let reply = command.query_async(&mut self.connection).await;
        reply.map_err(|error| self.peer.failure(&error))
    }
}

/// The result of `PING`: also the answer that the user lacks the permission to send it shows that
/// the connection works.
fn answered(result: Result<(), RedisError>) -> Result<(), RedisError> {
    match result {
        Err(error) if error.code() == Some("NOPERM") => Ok(()),
        result => result,
    }
}

/// The driver's client, with the certificates that the files hold now. Blocks while it reads them.
fn client(config: &RedisConfig) -> Result<Client, String> {
    let address = if config.redis_host.starts_with('/') {
        ConnectionAddr::Unix(config.redis_host.clone().into())
    } else if config.tls {
        ConnectionAddr::TcpTls {
            host: config.redis_host.clone(),
            port: config.redis_port,
            insecure: false,
            tls_params: None,
        }
    } else {
        ConnectionAddr::Tcp(config.redis_host.clone(), config.redis_port)
    };
    // The login is this program's own.
    let settings = RedisConnectionInfo::default().set_skip_set_lib_name();
    let unusable = |error: RedisError| format!("the certificates cannot be used: {error}");
    let info = address
        .into_connection_info()
        .map_err(unusable)?
        .set_tcp_settings(TcpSettings::default().set_nodelay(true))
        .set_redis_settings(settings);
    let (roots, identity) = (config.roots()?, config.identity()?);
    if roots.is_none() && identity.is_none() {
        return Client::open(info).map_err(unusable);
    }
    let certificates = TlsCertificates {
        client_tls: identity.map(|identity| ClientTlsConfig {
            client_cert: identity.certificates.pem.clone(),
            client_key: identity.key.expose().to_owned(),
        }),
        root_cert: roots.map(|roots| roots.pem),
    };
    Client::build_with_tls(info, certificates).map_err(unusable)
}
