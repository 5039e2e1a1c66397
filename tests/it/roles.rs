//! The roles of docs/connecting.md, by the SQL that stands there: an owner migrates, another role
//! serves.

use std::time::{Duration, Instant};

use crate::support::{self, Ended, PATIENT, SOON, Service, World, eventually, execute};

const CONNECTING: &str = include_str!("../../docs/connecting.md");
/// The roles and passwords in the document.
const OWNER: (&str, &str) = ("visitas_dono", "troque-esta-senha");
const APP: (&str, &str) = ("visitas_app", "troque-esta-tambem");

#[tokio::test(flavor = "multi_thread")]
async fn role_that_cannot_migrate_serves_once_the_owner_has_migrated() {
    let world = World::of_its_own();
    world.sql(&recipe("Two roles")).await;
    let mut app = settings(&world, APP);
    app.extend(support::settings(&PATIENT));
    let service = Service::start(&app).await;
    until_down_because(&service, "role visitas_app has no CREATE on schema public").await;
    assert_eq!(migrations(&service).await, "pending");
    // The role has created nothing that the owner could not alter.
    let ended = Ended::of(&["migrate"], &settings(&world, OWNER)).await;
    assert!(
        ended.output.ends_with("\n3 migrations applied\n"),
        "{ended:?}"
    );
    service.until_ready().await;
    assert_eq!(service.visit().await, (1, 1));
    assert_eq!(migrations(&service).await, "ok");
    for logged in ["migrating the database", "store is still down"] {
        assert_eq!(service.logged(logged).len(), 0, "{}", service.printed());
    }
    assert_eq!(service.logged("store is down").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "reads a clock: make faults"]
async fn role_that_cannot_migrate_serves_within_a_second_of_the_migration() {
    let world = World::of_its_own();
    world.sql(&recipe("Two roles")).await;
    let service = Service::start(&settings(&world, APP)).await;
    until_down_because(&service, "role visitas_app").await;
    let ended = Ended::of(&["migrate"], &settings(&world, OWNER)).await;
    let migrated = Instant::now();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    eventually("a visit is recorded", SOON, async || {
        service.get("/").await.status == 200
    })
    .await;
    let took = migrated.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn existing_table_is_adopted_by_its_owner_and_served_by_the_other_role() {
    let world = World::of_its_own();
    world
        .sql(
            "create table visitas (id serial primary key, data_hora timestamp default now()); \
             insert into visitas default values",
        )
        .await;
    world.sql(&recipe("Two roles")).await;
    let (_, after) = CONNECTING
        .split_once("already has to belong to the owner: `")
        .expect("the step for an existing table");
    let (step, _) = after.split_once('`').expect("its end");
    world.sql(step).await;
    let ended = Ended::of(&["migrate"], &settings(&world, OWNER)).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let service = Service::start(&settings(&world, APP)).await;
    service.until_ready().await;
    assert_eq!(service.visit().await.0, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_works_for_the_role_that_serves() {
    let world = World::of_its_own();
    world.sql(&recipe("Two roles")).await;
    let app = settings(&world, APP);
    let migrated = Ended::of(&["migrate"], &settings(&world, OWNER)).await;
    assert_eq!(migrated.code, Some(0), "{migrated:?}");
    let service = Service::start(&app).await;
    service.until_ready().await;
    assert_eq!(service.visit().await.0, 1);

    // Changes by hand, of this role too, and ids in the way of the sequence.
    let mut session = world.session_as(APP.0, APP.1).await;
    execute(&mut session, BY_HAND).await.expect("changes");
    eventually("a visit is recorded", SOON, async || {
        service.get("/").await.status == 200
    })
    .await;
    assert_eq!(service.visit().await.0, world.rows().await);

    let rows = || async { Some(world.rows().await as f64) };
    eventually("the gauge has the rows", SOON, async || {
        service.metric("visitas_rows").await == rows().await
    })
    .await;
    for command in ["recount", "reconcile", "migrate"] {
        let ended = Ended::of(&[command], &app).await;
        assert_eq!(ended.code, Some(0), "{command}: {ended:?}");
    }
    service.until_ready().await;

    // After a restart the ledger of the count is adopted.
    world.postgres.kill().expect("Postgres ends");
    world.postgres.start_again().expect("Postgres starts");
    eventually("a visit is recorded", SOON, async || {
        service.get("/").await.status == 200
    })
    .await;
    service.until_ready().await;
    assert_eq!(service.visit().await.0, world.rows().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn exact_rights_of_the_document_are_enough_and_each_is_needed() {
    let world = World::of_its_own();
    world.sql("create role visitas_app login password 'troque-esta-tambem'; revoke create on schema public from public").await;
    let owner = Ended::of(&["migrate"], &world.settings()).await;
    assert_eq!(owner.code, Some(0), "{owner:?}");
    let grants = recipe("A database that is migrated already");
    world.sql("revoke usage on schema public from public").await;
    world.sql(&grants).await;
    let app = settings(&world, APP);
    {
        world.sql(OCCASIONS).await;
        let service = Service::start(&app).await;
        service.until_ready().await;
        assert_eq!(service.visit().await.0, world.rows().await);
        let ended = Ended::of(&["reconcile"], &app).await;
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let ended = Ended::of(&["recount"], &app).await;
        assert_eq!(ended.code, Some(1), "{ended:?}");
        let denied = "permission denied for table visitas";
        assert!(ended.error().contains(denied), "{ended:?}");
    }
    for (right, object, error) in rights(&grants) {
        assert!(CONNECTING.contains(&format!("`{error}`")), "{error}");
        world
            .sql(&format!("revoke {right} on {object} from visitas_app"))
            .await;
        world.sql(OCCASIONS).await;
        let service = Service::start(&app).await;
        eventually(&format!("{error} without {right}"), SOON, async || {
            why_down(&service).contains(&error)
        })
        .await;
        world
            .sql(&format!("grant {right} on {object} to visitas_app"))
            .await;
        service.until_ready().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn functions_of_the_document_are_those_of_the_migrations() {
    let world = World::new();
    drop(world.serve().await);
    let functions = "select string_agg(oid::regprocedure::text, ', ' order by proname) from pg_proc \
                     where pronamespace = 'public'::regnamespace \
                       and prorettype <> 'trigger'::regtype";
    let (functions,): (String,) = world.row(functions).await;
    let grants = recipe("A database that is migrated already");
    for function in functions.split("), ") {
        let name = function.split('(').next().expect("a name");
        assert!(grants.contains(&format!("public.{name}(")), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn role_that_does_not_own_the_table_creates_nothing() {
    let world = World::new();
    let role = Role::create(&world, "").await;
    world
        .sql(&format!(
            "create table visitas (id serial primary key); \
             grant all on visitas to {role}; grant create on schema public to {role}",
            role = role.name
        ))
        .await;
    let service = Service::start(&role.settings(&world)).await;
    let why = format!(
        "role {} does not own table visitas, which role usuario owns: \
         run `visitas migrate` as a role that can",
        role.name
    );
    until_down_because(&service, &why).await;
    let created = "select count(*) from pg_class where relname like 'visitas\\__%' \
                   and relname not in ('visitas_id_seq', 'visitas_pkey')";
    assert_eq!(world.number(created).await, 0);
    assert_eq!(migrations(&service).await, "pending");
    // It migrates by itself as soon as it can.
    world
        .sql(&format!("alter table visitas owner to {}", role.name))
        .await;
    service.until_ready().await;
    assert_eq!(service.visit().await.0, 1);
    drop(service);
    world.drop_owned(&role).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn member_that_inherits_nothing_migrates_as_the_owner_by_a_setting_of_the_role() {
    let world = World::new();
    let owner = Role::create(&world, "").await;
    let member = Role::create(&world, "noinherit").await;
    world
        .sql(&format!(
            "revoke create on schema public from public; \
             grant usage, create on schema public to {owner}; grant {owner} to {member}",
            owner = owner.name,
            member = member.name
        ))
        .await;
    let ended = Ended::of(&["migrate"], &member.settings(&world)).await;
    let why = format!("role {} has no CREATE on schema public", member.name);
    assert!(ended.error().contains(&why), "{ended:?}");
    world
        .sql(&format!(
            "alter role {} set role = {}",
            member.name, owner.name
        ))
        .await;
    let service = Service::start(&member.settings(&world)).await;
    service.until_ready().await;
    assert_eq!(service.visit().await.0, 1);
    let tables: i64 = sqlx::query_scalar(
        "select count(*) from pg_class where relname = 'visitas' and relowner = $1::regrole",
    )
    .bind(&owner.name)
    .fetch_one(&mut world.session().await)
    .await
    .expect("the owner");
    assert_eq!(tables, 1);
    drop(service);
    world.drop_owned(&member).await;
    world.drop_owned(&owner).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ledger_that_the_role_cannot_read_is_another_programs() {
    let world = World::new();
    let role = Role::create(&world, "").await;
    world
        .sql(&format!(
            "create table _sqlx_migrations (version bigint); grant create on schema public to {}",
            role.name
        ))
        .await;
    let service = Service::start(&role.settings(&world)).await;
    service.until_ready().await;
    assert_eq!(service.visit().await.0, 1);
    drop(service);
    world.drop_owned(&role).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_the_document_names_are_enough() {
    for (limit, enough) in [(1, false), (2, true)] {
        let world = World::new();
        let role = Role::create(&world, &format!("connection limit {limit}")).await;
        world
            .sql(&format!("grant create on schema public to {}", role.name))
            .await;
        let ended = Ended::of(&["migrate"], &role.settings(&world)).await;
        assert_eq!(ended.code, Some(i32::from(!enough)), "{limit}: {ended:?}");
        if !enough {
            let why = "migrating takes 2 sessions at once, serving up to 7";
            assert!(ended.error().contains(why), "{ended:?}");
        }
        world.drop_owned(&role).await;
    }
    let world = World::new();
    let role = Role::create(&world, "connection limit 7").await;
    world
        .sql(&format!("grant create on schema public to {}", role.name))
        .await;
    let service = Service::start(&role.settings(&world)).await;
    service.until_ready().await;
    world
        .sql(
            "drop table visitas, visitas_contagem, visitas_ajustes, visitas_migracoes cascade; \
             drop function registrar_visitas(timestamptz[])",
        )
        .await;
    eventually("the database is migrated again", SOON, async || {
        service.logged("the database is migrated").len() == 2
    })
    .await;
    service.until_ready().await;
    assert_eq!(service.visit().await.0, 1);
    assert!(
        !service.printed().contains("53300"),
        "{}",
        service.printed()
    );
    drop(service);
    world.drop_owned(&role).await;
}

/// Rows added and removed by hand, and ids in the way of the sequence: near and far.
const BY_HAND: &str = "insert into visitas select from generate_series(1, 3); \
                       delete from visitas where id in (select max(id) from visitas); \
                       insert into visitas (id) select max(id) + n from visitas, unnest(array[2, 3, 30000]) as n \
                       group by n";

/// What the next start needs every right for: an entry of another start of the server, changes by
/// hand, and ids in the way of the sequence.
const OCCASIONS: &str = "update visitas_contagem set origem = split_part(origem, '@', 1) || '@2000-01-01T00:00:00.000000'; \
                         insert into visitas default values; \
                         insert into visitas (id) select last_value + n from visitas_id_seq, unnest(array[1, 30000]) as n";

/// The SQL of the document beneath a heading or a line in bold.
fn recipe(title: &str) -> String {
    let (_, after) = CONNECTING
        .split_once(&format!("**{title}"))
        .unwrap_or_else(|| panic!("{title} in docs/connecting.md"));
    let (_, after) = after.split_once("```sql\n").expect("its SQL");
    let (sql, _) = after.split_once("```").expect("its end");
    sql.to_owned()
}

/// The rights of some grants, each with its object and the server's error without it. Of the functions
/// only the one that a visit calls.
fn rights(grants: &str) -> Vec<(String, String, String)> {
    let mut rights = Vec::new();
    for grant in grants.split(';') {
        let grant = grant.split_whitespace().collect::<Vec<_>>().join(" ");
        let Some((list, object)) = grant
            .strip_prefix("grant ")
            .and_then(|grant| grant.split_once(" on "))
        else {
            continue;
        };
        let (object, _) = object.rsplit_once(" to ").expect("a role");
        let (object, kind, name) = match object.split_once(' ') {
            Some(("function", _)) => (
                "function public.registrar_visitas(timestamptz[])",
                "function",
                "registrar_visitas",
            ),
            Some((kind, name)) => (object, kind, name),
            None => (object, "table", object),
        };
        let name = name.rsplit('.').next().expect("a name");
        for right in list.split(", ") {
            // Only the check after a trigger that removes rows needs it, and from PostgreSQL 17 on
            // that check goes on without it.
            if (kind, right) == ("sequence", "usage") {
                continue;
            }
            let error = format!("permission denied for {kind} {name}");
            rights.push((right.to_owned(), object.to_owned(), error));
        }
    }
    assert!(rights.len() > 9, "{rights:?}");
    rights
}

fn settings(world: &World, (user, password): (&str, &str)) -> Vec<(String, String)> {
    world.settings_but(
        "DB_PASSWORD",
        &[("DB_USER", user), ("DB_PASSWORD", password)],
    )
}

/// A role of one test, on the Postgres that tests share.
struct Role {
    name: String,
}

impl Role {
    async fn create(world: &World, options: &str) -> Self {
        let name = format!("papel_{}_{}", world.database, options.replace(' ', "_"));
        world
            .sql(&format!(
                "create role {name} login password 'senha' {options}"
            ))
            .await;
        Self { name }
    }

    fn settings(&self, world: &World) -> Vec<(String, String)> {
        settings(world, (&self.name, "senha"))
    }
}

impl World {
    /// Drops what the role owns and has, and the role.
    async fn drop_owned(&self, role: &Role) {
        self.sql(&format!("drop owned by {0}; drop role {0}", role.name))
            .await;
    }
}

async fn until_down_because(service: &Service, why: &str) {
    eventually(&format!("{why}: {}", service.printed()), SOON, async || {
        why_down(service).contains(why)
    })
    .await;
}

/// The reasons that the log gives for stores that are down.
fn why_down(service: &Service) -> String {
    ["store is down", "store is still down"]
        .into_iter()
        .flat_map(|message| service.logged(message))
        .map(|line| line["error"].to_string())
        .collect()
}

async fn migrations(service: &Service) -> String {
    let health = service.get("/health").await.json();
    let status = &health["checks"]["migrations"]["status"];
    status.as_str().expect("a status").to_owned()
}
