//! The text around the tables of the reports.

use std::process::Command;

use anyhow::Result;
use lab::program::visitas;
use time::OffsetDateTime;

const POWER_CUTS: &str = "\
PostgreSQL's data lies on ext4 in an image on XFS. While sixteen clients visit two replicas, `FICLONE` \
copies the image at one instant, which takes with it what had reached the device and nothing of the \
page cache. Then PostgreSQL is killed, and starts again on the copy. What was acknowledged before the \
copy must be there; a response from after it counts as not sent. Where everything starts (migration, \
adoption, a new volume) the replicas lose their power, too. The table has 300 000 rows before a \
checkpoint, a `recount` or an adoption. The controls take the flush away, and must lose visits: \
otherwise the test is blind. A device with a volatile cache that ignores a flush is not tested.\n\n";

const COMPOSE: &str = "\
`docker-compose.yml` under Docker, with an override file that puts its volume `db-data` on ext4 in an \
image on XFS. While sixteen clients visit the published port, `cp --reflink=always` copies the image, \
which takes with it what had reached the device and nothing of the page cache. Then all containers are \
killed, and `docker compose up` starts them again on the copy. What was acknowledged before the copy \
must be there; a response from after it counts as in doubt. The control runs `db` with `fsync=off`, and \
must lose visits: otherwise the test is blind.\n\n";

const LOST_MACHINES: &str = "\
Three machines (network namespaces with their own processes) run PostgreSQL under Patroni with \
`synchronous_mode: quorum` and `synchronous_mode_strict`, and etcd; HAProxy leads to the machine whose \
`/primary` says 200. Sixteen clients visit two replicas. An acknowledged visit must be there \
afterwards, and no number may occur twice. After an asynchronous failover all totals agree, so only \
the clients' numbers show the loss: the control, in which commits wait for no standby, must lose visits \
and give numbers twice. Patroni's `ttl` is 20 s, its smallest.\n\n";

const ORDER: &str = "\
Three replicas in front of the same three machines, 256 clients that do not pause. The judge compares \
all visits: a visit that was sent after another was answered has the higher number, in both stores.\n\n";

const PROOF: &str = "\
# The same test for other counters

Sixteen clients visit two replicas of each counter, all behind the same URL with the same four fields. \
After five seconds one replica is killed, then the store, then the power of the store's machine is cut \
([a hundred cuts of this service's alone](kills.md#power-cuts)); visits go on for three seconds after \
each. The judge that tests this service judges them all, by what the clients got. The counters are in \
[`proof/counters`](../proof/counters), each under 60 lines of Rust beside the `main.rs` that they share, \
written from the idea alone; the challenge's app is Flask ([`bench/peers/flask`](../bench/peers/flask)), \
served by Flask's own server.

- *lost*: acknowledged visits minus what the store has at rest, so at least so many. For this service: \
acknowledged numbers without a row of their own.
- *duplicate numbers*: visits whose number another visit had got.
- *gaps*: numbers that no acknowledged visit got. A visit in doubt leaves one: its client got no \
response, and it was counted.
- *out of order*: visits sent after a visit with the same or a higher number had been answered.
- *last number off by*: the number of one more visit, at rest, minus what the store has.
- *visits a second*: before anything is broken, with both replicas, the stores and the clients on one \
machine. Sixteen clients wait for the disk most of the time; [`bench/report.md`](../bench/report.md) has \
the throughput under more.

";

const WHY: &str = "
## Why

- **The challenge's Flask app** inserts in one transaction and counts in another. Two visits that \
insert before either counts get the same number.
- **Read, then write count + 1** (as hits first did): two visits that read the same count write the \
same one. One of them is lost, and both have its number.
- **Count in memory, write every 2 s** (as GoatCounter stores its hits): a kill loses what was not \
written yet. It promises no number for each visit, so only losses are judged.
- **Insert, then count, in two transactions**: as the Flask app, and faster, so more visits meet. \
No row is lost, because each insert is flushed.
- **Redis alone, without a log**: Redis keeps its counter in memory. When it is killed, the counter \
begins again at 1.
- **Redis alone, `appendfsync everysec`**: a kill of Redis loses nothing, because the log is in the \
page cache. A power cut takes up to two seconds of it.
- **Redis alone, `appendfsync always`** loses nothing and gives no number twice. It keeps a number and \
no rows: when a visit came is not known.
- **A counter row in the insert's transaction** keeps rows and numbers exact. Each visit holds the \
row's lock until its commit is flushed, so visits take turns on the disk.
- **This service** counts in the insert's transaction as well, once for all visits that wait. Its gaps \
are visits in doubt.

## Run it

```console
$ make proof
```

It takes four minutes, and needs Linux, root (or a `sudo` that asks for no password), loop devices and \
`xfsprogs`; elsewhere it says SKIPPED and why. Mounts and processes are in namespaces of their own, \
which end with it. `target/release/proof compare --only Redis` tests some.
";

/// The section on power cuts.
pub fn power_cuts(table: &str) -> Result<String> {
    Ok(format!(
        "{}{POWER_CUTS}{table}",
        origin("make powercut-long")?
    ))
}

/// The section on power cuts of the Compose stack.
pub fn compose(table: &str) -> Result<String> {
    Ok(format!(
        "{}{COMPOSE}{table}",
        origin("make powercut-compose")?
    ))
}

/// The section on lost machines.
pub fn lost_machines(table: &str) -> Result<String> {
    Ok(format!(
        "{}{LOST_MACHINES}{table}",
        origin("make failover")?
    ))
}

/// The section on order.
pub fn order(text: &str) -> Result<String> {
    Ok(format!("{}{ORDER}{text}", origin("make order")?))
}

/// The whole of docs/proof.md.
pub fn proof(table: &str) -> Result<String> {
    Ok(format!(
        "{PROOF}{table}\n{}{WHY}",
        origin("make proof")?.trim_end().to_owned() + "\n"
    ))
}

/// Which command wrote a report, when, and about which program.
fn origin(command: &str) -> Result<String> {
    let output = Command::new(visitas()?).arg("--version").output()?;
    let version = String::from_utf8(output.stdout)?;
    let date = OffsetDateTime::now_utc().date();
    let version = version.trim();
    Ok(format!(
        "- command: `{command}`\n- date: {date}\n- service: {version}\n\
         - processors: shared by the clients, the service and the stores\n\n"
    ))
}
