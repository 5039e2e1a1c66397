//! What becomes of a URL's parameters that set no setting.
//!
//! Providers and other drivers add parameters to the URLs that people paste here. A parameter that
//! changes nothing for this service is ignored. One that asks for something that the service does
//! not do is reported at the start. One that contradicts what the service does is refused. Must not
//! know: a parameter that sets a setting.

/// A parameter of a store's URL that asks for something that the service does not do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unenforced {
    /// The variable of the URL.
    pub setting: &'static str,
    /// The parameter's name.
    pub parameter: String,
    /// What the service does instead.
    pub reason: &'static str,
}

/// What becomes of some parameters: their names, the values that change nothing, and the verdict on
/// other values. Names have no underscores and hyphens here, and case does not matter, since
/// drivers spell the same name in different ways.
pub(super) type Rule = (&'static str, &'static str, Verdict);

#[derive(Clone, Copy)]
pub(super) enum Verdict {
    Ignored,
    /// With what the service does instead.
    Reported(&'static str),
    /// With the reason.
    Refused(&'static str),
    /// The values that are reported, with what the service does instead; and why others are
    /// refused.
    Either(&'static str, &'static str, &'static str),
}

use Verdict::{Either, Ignored, Refused, Reported};

/// The rules for `DATABASE_URL`. The names are those of libpq, of the drivers of other languages
/// and of providers.
pub(super) const POSTGRES: &[Rule] = &[
    (
        // libpq. DB_TIMEOUT limits connecting, too.
        "applicationname clientencoding connecttimeout fallbackapplicationname gssdelegation \
         gsslib keepalives keepalivescount keepalivesidle keepalivesinterval krbsrvname \
         loadbalancehosts maxprotocolversion sslcompression sslkeylogfile sslpassword \
         tcpusertimeout",
        "",
        Ignored,
    ),
    (
        // Prisma, node-postgres and Supabase.
        "binary connectionlimit connectiontimeoutmillis encoding idleintransactionsessiontimeout \
         idletimeoutmillis keepalive keepaliveinitialdelaymillis locktimeout max \
         maxconnectionlifetime maxidleconnectionlifetime min pooltimeout querytimeout \
         singleuseconnections sockettimeout statementcachesize statementtimeout supa uselibpqcompat",
        "",
        Ignored,
    ),
    (
        // SQLAlchemy, asyncpg, Django, Rails and Doctrine.
        "adapter advisorylocks asyncfallback charset checkouttimeout commandtimeout \
         connhealthchecks connmaxage disableserversidecursors executemanymode idletimeout \
         maxcacheablestatementsize maxcachedstatementlifetime maxoverflow minmessages pool \
         poolpreping poolrecycle poolsize preparedstatementcachesize preparedstatementnamefunc \
         preparedstatements readtimeout reapingfrequency reconnect serverversion statementlimit \
         timeout",
        "",
        Ignored,
    ),
    (
        // JDBC.
        "allowencodingchanges assumeminserverversion autosave binarytransfer cancelsignaltimeout \
         cleanupsavepoints defaultrowfetchsize hostrecheckseconds loggerfile loggerlevel \
         logintimeout logunclosedconnections preferquerymode preparedstatementcachequeries \
         preparedstatementcachesizemib preparethreshold protocolversion rewritebatchedinserts \
         sslfactoryarg sslresponsetimeout stringtype tcpkeepalive tcpnodelay",
        "",
        Ignored,
    ),
    (
        // pgx and lib/pq.
        "binaryparameters datestyle defaultqueryexecmode descriptioncachecapacity \
         disablepreparedbinaryresult minreadbuffersize poolhealthcheckperiod poolmaxconnidletime \
         poolmaxconnlifetime poolmaxconnlifetimejitter poolmaxconns poolminconns poolminidleconns \
         prefersimpleprotocol statementcachecapacity statementcachemode timezone",
        "",
        Ignored,
    ),
    (
        "channelbinding",
        "disable prefer",
        Either(
            "require",
            "the login is not bound to the TLS channel; sslmode=verify-full verifies the server",
            "expected disable, prefer or require",
        ),
    ),
    (
        "gssencmode",
        "allow disable prefer",
        Either(
            "require",
            "connections are encrypted by TLS alone, as sslmode says",
            "expected disable, prefer or require",
        ),
    ),
    (
        "requireauth",
        "",
        Reported("the server chooses how the role logs in"),
    ),
    (
        "oauthclientid oauthclientsecret oauthissuer oauthscope passfile scramclientkey \
         scramserverkey",
        "",
        Reported("the role logs in by its password or a client certificate"),
    ),
    (
        "targetservertype targetsessionattrs",
        "any master preferprimary primary read-write",
        Refused("visits need a server that accepts writes: name the primary"),
    ),
    ("readonly", "0 false no off", Refused("visits are writes")),
    (
        "sslcrl sslcrldir",
        "",
        Reported("revocation lists are not read"),
    ),
    (
        "requirepeer",
        "",
        Reported("the account of the server's process is not checked"),
    ),
    (
        "sslminprotocolversion",
        "tlsv1.2",
        Either(
            "tlsv1 tlsv1.1 tlsv1.3",
            "TLS 1.2 and 1.3 are accepted",
            "expected TLSv1.2 or TLSv1.3",
        ),
    ),
    (
        "sslmaxprotocolversion",
        "tlsv1.3",
        Either(
            "tlsv1.2",
            "TLS 1.3 is used where the server has it",
            "TLS 1.2 and 1.3 alone are accepted",
        ),
    ),
    (
        "sslnegotiation",
        "postgres",
        Either(
            "direct",
            "TLS begins after a request for it, as with sslnegotiation=postgres",
            "expected postgres or direct",
        ),
    ),
    (
        "sslsni",
        "1",
        Either(
            "0",
            "the server's name is sent at the TLS handshake",
            "expected 0 or 1",
        ),
    ),
    (
        "minprotocolversion",
        "3.0",
        Reported("the service speaks protocol 3.0"),
    ),
    (
        "sslcertmode",
        "allow",
        Either(
            "disable require",
            "a client certificate is sent if there is one and the server asks for it",
            "expected disable, allow or require",
        ),
    ),
    (
        "sslaccept sslfactory sslhostnameverifier",
        "accept_invalid_certs org.postgresql.ssl.nonvalidatingfactory",
        Reported("sslmode and sslrootcert decide which certificates are trusted"),
    ),
    (
        "sslidentity",
        "",
        Reported("a client certificate is sslcert and sslkey, in PEM"),
    ),
    (
        "pgbouncer",
        "0 false off",
        Reported(
            "the service needs sessions of its own, which a pooler in transaction mode does not give",
        ),
    ),
    (
        "replication",
        "0 false no off",
        Refused("visits need an ordinary session"),
    ),
    (
        "cloudsqlinstance service servicefile socketfactory unixsock",
        "",
        Refused("the server is named by host and port"),
    ),
];

/// The rules for `REDIS_URL`. The names are those of redis-py, ioredis, go-redis, Lettuce,
/// StackExchange.Redis and Celery.
pub(super) const REDIS: &[Rule] = &[
    (
        // REDIS_TIMEOUT limits connecting, too.
        "abortconnect allowadmin asynctimeout clientname commandtimeout connectretry \
         connecttimeout connmaxidletime connmaxlifetime contexttimeoutenabled decoderesponses \
         dialtimeout enableofflinequeue enablereadycheck encoding encodingerrors family \
         healthcheckinterval idlecheckfrequency idletimeout keepalive lazyconnect libname \
         libraryname libver maxconnage maxconnections maxidleconns maxretries \
         maxretriesperrequest maxretrybackoff minidleconns minretrybackoff nodelay poolfifo \
         poolsize pooltimeout protocol readtimeout retryonerror retryontimeout \
         socketconnecttimeout socketkeepalive sockettimeout sockettype sslprotocols synctimeout \
         timeout writetimeout",
        "",
        Ignored,
    ),
    (
        "sslcertreqs sslcheckhostname verifypeer",
        "1 cert_required full required true",
        Reported(
            "the certificate and its name are always verified; REDIS_TLS_CA names authorities to trust",
        ),
    ),
    (
        "insecureskipverify skipverify",
        "0 false",
        Reported(
            "the certificate and its name are always verified; REDIS_TLS_CA names authorities to trust",
        ),
    ),
    (
        "channelprefix keyprefix prefix",
        "",
        Reported("the key is always visitas_home"),
    ),
    (
        "readfromreplicas readonly",
        "0 false",
        Reported("visits are writes"),
    ),
    (
        "sslcacerts sslcadata sslcapath",
        "",
        Refused("set REDIS_TLS_CA instead"),
    ),
    (
        "sslcertfile sslkeyfile",
        "",
        Refused("set REDIS_TLS_CERT and REDIS_TLS_KEY instead"),
    ),
    (
        "mastername sentinel sentinelmasterid sentinels servicename",
        "0 false",
        Refused("Redis Sentinel is not supported: name the primary itself"),
    ),
    (
        "addr cluster clustermode",
        "0 false",
        Refused("Redis Cluster is not supported: name a server that keeps every key"),
    ),
];

/// What becomes of a parameter of the URL in `setting`. `None` if it changes nothing.
///
/// # Errors
/// Why the parameter is refused, to follow the variable's name.
pub(super) fn judge(
    setting: &'static str,
    rules: &[Rule],
    parameter: &str,
    value: &str,
) -> Result<Option<Unenforced>, String> {
    let report = |reason| {
        let parameter = parameter.to_owned();
        Ok(Some(Unenforced {
            setting,
            parameter,
            reason,
        }))
    };
    if let Some((_, unchanging, verdict)) = find(rules, parameter) {
        let word = value.to_ascii_lowercase();
        if value.is_empty() || has_word(unchanging, &word) {
            return Ok(None);
        }
        return match verdict {
            Ignored => Ok(None),
            Reported(reason) => report(reason),
            Either(reported, reason, _) if has_word(reported, &word) => report(reason),
            Refused(reason) | Either(_, _, reason) => {
                Err(format!("has the parameter {parameter}: {reason}"))
            }
        };
    }
    let is_name = parameter.len() <= 40
        && parameter.starts_with(|first: char| first.is_ascii_alphabetic())
        && parameter
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
    if !is_name || value.is_empty() {
        return Err(
            "has a parameter that is not name=value (in a password, encode ? as %3F)".to_owned(),
        );
    }
    let plain = plain(parameter);
    // A misspelt parameter must not make a connection less secure than its author believes.
    if is_about_security(&plain) {
        let instead = match setting {
            "REDIS_URL" => "rediss:// asks for TLS, and REDIS_TLS_CA names authorities to trust",
            _ => "TLS is set by sslmode and sslrootcert",
        };
        return Err(format!(
            "has the parameter {parameter}, which is unknown: {instead}"
        ));
    }
    report("the parameter is unknown")
}

/// Whether a parameter is about encryption or authentication, or is spelt nearly like one that is.
fn is_about_security(plain: &str) -> bool {
    let near = |word: &&str, distance| strsim::osa_distance(plain, word) <= distance;
    ["auth", "cert", "encrypt", "ssl", "tls", "verify"]
        .iter()
        .any(|word| plain.contains(word) || near(word, 1))
        || ["sslmode", "sslrootcert"].iter().any(|word| near(word, 2))
}

/// A parameter's name in lower case, without underscores and hyphens.
pub(super) fn plain(parameter: &str) -> String {
    parameter.replace(['_', '-'], "").to_ascii_lowercase()
}

/// Whether the parameter is one of these words, which are written as [`plain`] writes them.
pub(super) fn is_one_of(words: &str, parameter: &str) -> bool {
    has_word(words, &plain(parameter))
}

fn find(rules: &[Rule], parameter: &str) -> Option<Rule> {
    let plain = plain(parameter);
    rules
        .iter()
        .copied()
        .find(|(names, ..)| has_word(names, &plain))
}

fn has_word(words: &str, word: &str) -> bool {
    words.split(' ').any(|known| known == word)
}
