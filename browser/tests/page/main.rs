//! The page as a browser shows it: Debian's Chromium, against the real service with real stores.
//!
//! `make browser` runs these tests. They write their pictures to `target/screenshots`.

mod browser;
mod site;

use std::time::{Duration, Instant};

use lab::collector::Collector;
use lab::wait::{SOON, eventually};
use serde_json::json;

use self::browser::{Browser, DARK, LIGHT, NARROW};
use self::site::Site;

/// What the page says of a store that is down or has come back, and the headings alone.
const POSTGRES: &str = ".notice.bad";
const REDIS: &str = ".notice.warn";
const POSTGRES_NEWS: &str = "#postgres-news";
const REDIS_NEWS: &str = "#redis-news";

/// A store that does not come back by itself is noticed and probed well within this.
const OUTAGE: Duration = Duration::from_secs(20);

/// A stream's first comment is sent after 15 s.
const COMMENT: Duration = Duration::from_secs(40);

#[tokio::test]
async fn page_speaks_the_language_that_the_browser_prefers() {
    let (site, browser) = (Site::start(&[]), Browser::open().await);
    browser.prefer("fr, en;q=0.5").await;
    browser.goto(&site.url("/")).await;
    assert_eq!(
        browser.text("h1").await,
        "1\nis the number of your visit. It is committed and on disk."
    );
    assert_eq!(
        browser.evaluate("document.documentElement.lang").await,
        "en"
    );

    browser.prefer("pt-BR, pt;q=0.9, en;q=0.5").await;
    browser.goto(&site.url("/")).await;
    assert_eq!(
        browser.text("h1").await,
        "2\né o número da sua visita. Ela está confirmada e gravada em disco."
    );
    assert_eq!(
        browser.evaluate("document.documentElement.lang").await,
        "pt-BR"
    );
    assert_eq!(browser.text("header a").await, "English");
    finish(&site, browser, &[]).await;
}

#[tokio::test]
async fn link_to_the_other_language_counts_no_visit() {
    let (site, browser) = (Site::start(&[]), Browser::open().await);
    browser.goto(&site.url("/")).await;
    browser
        .evaluate("document.querySelector('header a').click()")
        .await;
    let total = "1\né o total de visitas até agora. Olhar esta página não conta nenhuma.";
    browser.until_text("h1", total).await;
    assert_eq!(site.rows(), 1);
    browser
        .evaluate("document.querySelector('main a.action').click()")
        .await;
    browser.until_text("h1", "number of your visit").await;
    assert_eq!(site.rows(), 2);
    finish(&site, browser, &[]).await;
}

#[tokio::test]
async fn page_is_useful_without_javascript() {
    let (site, browser) = (Site::start(&[]), Browser::open().await);
    site.visit();
    let off = json!({"value": true});
    browser
        .tool("Emulation.setScriptExecutionDisabled", off)
        .await;
    browser.goto(&site.url("/")).await;
    assert!(browser.text("h1").await.starts_with("2\n"));
    assert_eq!(browser.text(".store:has(#postgres) .state").await, "works");
    assert_eq!(browser.text("#redis-total").await, "2");
    assert!(browser.text(".live").await.contains("it counts no visit"));
    assert!(browser.text(".own").await.contains("Recorded alone"));
    assert_eq!(browser.text("#moment").await, "", "it would do nothing");
    // A chart is there once an interval of five seconds is complete.
    eventually("the chart is drawn", SOON, async || {
        browser
            .evaluate("document.querySelector('.live a').click()")
            .await;
        let line = "document.getElementById('visits-line').getAttribute('d').length > 0";
        browser.evaluate(line).await == true
    })
    .await;
    assert_eq!(site.rows(), 2);
    browser.picture("no-javascript").await;
    finish(&site, browser, &[]).await;
}

/// As without CSS, or in a reader mode: a form of a text that is not true is hidden all the same.
#[tokio::test]
async fn page_without_its_style_says_what_is_true_and_nothing_else() {
    let (site, browser) = (Site::start(&[]), Browser::open().await);
    browser.goto(&site.url("/")).await;
    browser.until_text(".live", "Live").await;
    browser
        .evaluate("document.querySelector('link[rel=stylesheet]').disabled = true")
        .await;
    let said = browser.text("body").await;
    for held in ["works", "the same as PostgreSQL", "Live", "Moment"] {
        assert!(said.contains(held), "{held}: {said}");
    }
    for other in [
        "takes no visits",
        "is back",
        "away for",
        "safe",
        "Visit again",
        "counts no visits",
        "down since",
        "behind",
        "ahead",
        "No news",
        "See it as it is now",
    ] {
        assert!(!said.contains(other), "{other}: {said}");
    }
    finish(&site, browser, &[]).await;
}

/// A number of JavaScript holds 2^53 and no odd number beyond it.
#[tokio::test]
async fn totals_beyond_the_numbers_of_javascript_are_exact() {
    let (site, browser) = (Site::start(&[]), Browser::open().await);
    site.set_redis(9_007_199_254_740_992);
    browser.goto(&site.url("/")).await;
    browser.until_text(".live", "Live").await;
    browser
        .until_text("#redis-total", "9,007,199,254,740,993")
        .await;
    // Close to the end of the counter, with room for a batch.
    site.set_redis(i64::MAX - 5_000);
    browser
        .until_text("#redis-total", "9,223,372,036,854,770,807")
        .await;
    let difference = "9,223,372,036,854,770,806 ahead of PostgreSQL";
    browser.until_text(".store:has(#redis)", difference).await;
    finish(&site, browser, &[]).await;
}

#[tokio::test]
async fn comment_on_the_stream_leaves_the_page_live() {
    let (site, browser) = (Site::start(&[]), Browser::open().await);
    browser.goto(&site.url("/")).await;
    browser.until_text(".live", "Live").await;
    // The page does not see comments, so a second stream, which is opened after the page's, is read.
    let read = "(window.read = '', fetch('/visitas/stream').then(async ({ body }) => { \
        for await (const bytes of body) window.read += new TextDecoder().decode(bytes); }), true)";
    browser.evaluate(read).await;
    eventually("a comment was sent", COMMENT, async || {
        browser.evaluate("/\\n\\n:\\n\\n/.test(window.read)").await == true
    })
    .await;
    assert_eq!(browser.text(".live").await, "Live");
    assert_eq!(site.streams(), Some(2.0));
    finish(&site, browser, &[]).await;
}

#[tokio::test]
async fn totals_move_while_the_number_of_the_visit_stays() {
    let (site, browser) = (Site::start(&[]), Browser::open().await);
    browser.goto(&site.url("/")).await;
    for _ in 0..1234 {
        site.visit();
    }
    browser.until_text("#postgres-total", "1,235").await;
    browser.until_text("#redis-total", "1,235").await;
    browser
        .until_text(".store:has(#redis)", "the same as PostgreSQL")
        .await;
    assert!(browser.text("h1").await.starts_with("1\n"));
    eventually("the chart has them", SOON, async || {
        let visits = browser.text("#now-visits").await;
        visits.replace(',', "").parse().unwrap_or(0.0) > 100.0
    })
    .await;
    assert!(browser.text("#now-p99").await.ends_with(" ms"));
    finish(&site, browser, &[]).await;
}

#[tokio::test]
async fn outage_and_its_end_are_shown_without_a_reload() {
    let (site, browser) = (Site::start(&[]), Browser::open().await);
    browser.goto(&site.url("/")).await;
    browser.until_text(".live", "Live").await;
    assert_eq!(browser.text(POSTGRES).await, "");
    browser.evaluate("window.isTheSame = true").await;

    site.postgres.kill().expect("it ends");
    browser
        .until_text_within(POSTGRES_NEWS, "PostgreSQL takes no visits", OUTAGE)
        .await;
    let notice = browser.text(POSTGRES).await;
    assert!(notice.contains("Your own visit is safe"), "{notice}");
    assert!(notice.contains("Redis works"), "{notice}");
    assert!(
        browser
            .text(".store:has(#postgres)")
            .await
            .contains("down since")
    );
    assert_eq!(browser.text("#postgres-total").await, "1", "the last known");
    browser
        .until_text("#announcement", "PostgreSQL takes no visits")
        .await;

    site.postgres.start_again().expect("it starts");
    browser
        .until_text_within(POSTGRES_NEWS, "PostgreSQL is back", OUTAGE)
        .await;
    assert!(
        browser
            .text(POSTGRES)
            .await
            .contains("PostgreSQL was away for")
    );
    browser
        .until_text("#announcement", "PostgreSQL was away for")
        .await;
    assert_eq!(browser.text(".store:has(#postgres) .state").await, "works");
    assert_eq!(site.visit(), 2);
    browser.until_text("#postgres-total", "2").await;
    assert_eq!(browser.evaluate("window.isTheSame").await, true);
    finish(&site, browser, &[]).await;
}

#[tokio::test]
async fn refused_visit_sees_the_end_of_the_outage() {
    let (site, browser) = (Site::start(&[]), Browser::open().await);
    for _ in 0..30 {
        site.visit();
    }
    browser.goto(&site.url("/visitas")).await;
    browser.until_text("#postgres-total", "30").await;
    site.postgres.kill().expect("it ends");
    browser.goto(&site.url("/visitas")).await;
    browser
        .until_text_within(POSTGRES_NEWS, "PostgreSQL takes no visits", OUTAGE)
        .await;
    browser.goto(&site.url("/")).await;
    assert!(
        browser
            .text("h1")
            .await
            .starts_with("30\nwas the number of visits at")
    );
    let notice = browser.text(POSTGRES).await;
    assert!(notice.contains("Your visit was not recorded."), "{notice}");
    browser.until_text(".live", "Live").await;
    // The failed visit is in the chart once its interval of five seconds is complete.
    browser.until_text("[data-if=failures]", "failed").await;
    browser.picture("outage").await;
    assert_eq!(browser.violations().await, [""; 0]);
    browser.look(DARK).await;
    browser.picture("outage-dark").await;
    assert_eq!(browser.violations().await, [""; 0]);
    browser.look(NARROW).await;
    browser.picture("outage-narrow").await;
    assert_eq!(browser.violations().await, [""; 0]);
    assert_fits(&browser).await;

    site.postgres.start_again().expect("it starts");
    browser
        .until_text_within(POSTGRES_NEWS, "PostgreSQL is back", OUTAGE)
        .await;
    browser.look(LIGHT).await;
    browser.picture("back").await;
    assert_eq!(browser.violations().await, [""; 0]);
    let notice = browser.text(POSTGRES).await;
    assert!(notice.contains("Your visit was not recorded."), "{notice}");
    browser
        .evaluate("document.querySelector('.notice a.action').click()")
        .await;
    browser
        .until_text("h1", "31\nis the number of your visit")
        .await;
    finish(&site, browser, &["status of 503"]).await;
}

#[tokio::test]
async fn visit_in_doubt_is_a_page_that_says_so() {
    let (site, browser) = (Site::start(&[]), Browser::open().await);
    site.visit();
    browser.goto(&site.url("/visitas")).await;
    browser.until_text("#postgres-total", "1").await;
    // The visit's statement is sent, and Postgres ends before it replies.
    let (holder, visit) = (site.hold_count(), site.url("/"));
    tokio::join!(browser.goto(&visit), async {
        eventually("the visit is with Postgres", SOON, async || {
            site.waits_for_count()
        })
        .await;
        site.postgres.kill().expect("it ends");
    });
    drop(holder);
    let number = browser.text("h1").await;
    assert!(
        number.starts_with("1\nwas the number of visits at"),
        "{number}"
    );
    assert!(
        number.ends_with("It is not known whether yours was counted after that."),
        "{number}"
    );
    let notice = browser.text(POSTGRES).await;
    let doubt = "It is not known whether your visit was recorded";
    assert!(notice.contains(doubt), "{notice}");
    assert!(!notice.contains("Visit again"), "{notice}");
    browser.until_text(".live", "Live").await;
    browser.picture("in-doubt").await;
    assert_eq!(browser.violations().await, [""; 0]);

    site.postgres.start_again().expect("it starts");
    browser
        .until_text_within(POSTGRES_NEWS, "PostgreSQL is back", OUTAGE)
        .await;
    let notice = browser.text(POSTGRES).await;
    assert!(notice.contains(doubt), "{notice}");
    finish(&site, browser, &["status of 503"]).await;
}

#[tokio::test]
async fn without_redis_the_visit_is_recorded_and_the_page_says_so() {
    let (site, browser) = (Site::start(&[]), Browser::open().await);
    site.visit();
    browser.goto(&site.url("/visitas")).await;
    browser.until_text("#redis-total", "1").await;
    site.redis.kill().expect("it ends");
    browser
        .until_text_within(REDIS_NEWS, "Redis counts no visits", OUTAGE)
        .await;
    browser.goto(&site.url("/")).await;
    assert!(
        browser
            .text("h1")
            .await
            .starts_with("2\nis the number of your visit")
    );
    assert!(
        browser
            .text(REDIS)
            .await
            .contains("Visits are recorded all the same")
    );
    assert!(browser.text(".parts").await.contains("not counted"));
    assert_eq!(browser.text("#redis-total").await, "1", "the last known");
    assert_eq!(browser.text(POSTGRES).await, "");
    browser.picture("degraded").await;
    assert_eq!(browser.violations().await, [""; 0]);
    browser.look(DARK).await;
    assert_eq!(browser.violations().await, [""; 0]);

    site.redis.start_again().expect("it starts");
    browser
        .until_text_within(REDIS_NEWS, "Redis is back", OUTAGE)
        .await;
    finish(&site, browser, &[]).await;
}

#[tokio::test]
async fn page_says_when_it_has_no_news_and_connects_again() {
    let (site, browser) = (Site::start(&[]), Browser::open().await);
    browser.goto(&site.url("/")).await;
    browser.until_text(".live", "Live").await;
    site.service.pause().expect("it runs");
    browser.until_text(".live", "No news since").await;
    site.service.resume().expect("it runs");
    browser.until_text(".live", "Live").await;
    finish(&site, browser, &[]).await;
}

#[tokio::test]
async fn hidden_page_has_no_stream() {
    let (site, browser) = (Site::start(&[]), Browser::open().await);
    browser.goto(&site.url("/")).await;
    let streams = async |count: f64| {
        let what = format!("there are {count} streams");
        eventually(&what, SOON, async || site.streams() == Some(count)).await;
    };
    streams(1.0).await;
    let page = browser.driver.window().await.expect("a window");
    let other = browser.driver.new_tab().await.expect("a tab");
    browser
        .driver
        .switch_to_window(other)
        .await
        .expect("the tab");
    streams(0.0).await;
    browser
        .driver
        .switch_to_window(page)
        .await
        .expect("the page");
    browser.tool("Page.bringToFront", json!({})).await;
    streams(1.0).await;
    finish(&site, browser, &[]).await;
}

#[tokio::test]
async fn page_passes_an_accessibility_audit() {
    let collector = Collector::start().await;
    let (site, browser) = (watched_site(&collector), Browser::open().await);
    browser.goto(&site.url("/")).await;
    browser.until_text(".live", "Live").await;
    assert_eq!(browser.violations().await, [""; 0], "the first visit");
    browser.picture("first").await;
    rush_hour(&site).await;
    for (look, name) in [(LIGHT, "light"), (DARK, "dark"), (NARROW, "narrow")] {
        browser.look(look).await;
        until_linked_to_its_trace(&site, &browser).await;
        browser.until_text(".live", "Live").await;
        browser.picture(name).await;
        assert_eq!(browser.violations().await, [""; 0], "{name}");
        assert_fits(&browser).await;
    }
    browser.goto(&site.url("/visitas?lang=pt")).await;
    browser.until_text(".live", "Ao vivo").await;
    assert_eq!(
        browser.violations().await,
        [""; 0],
        "in Portuguese, without a visit"
    );
    assert_fits(&browser).await;
    finish(&site, browser, &[]).await;
}

#[tokio::test]
async fn keyboard_reaches_everything_in_the_order_of_the_page() {
    let collector = Collector::start().await;
    let (site, browser) = (watched_site(&collector), Browser::open().await);
    until_linked_to_its_trace(&site, &browser).await;
    browser.until_text(".live", "Live").await;
    let trace = browser.text("a.trace").await;
    let link = browser
        .evaluate("document.querySelector('a.trace').href")
        .await;
    assert_eq!(link, format!("http://127.0.0.1:16686/trace/{trace}"));
    let mut order = Vec::new();
    loop {
        press(&browser, "Tab").await;
        let focused =
            "document.activeElement.labels?.[0]?.innerText ?? document.activeElement.innerText";
        let focused = browser.evaluate(focused).await;
        let focused = focused.as_str().unwrap_or_default().to_owned();
        let is_visible = "document.activeElement.matches(':focus-visible')";
        if order.len() > 20
            || browser
                .evaluate("document.activeElement === document.body")
                .await
                == true
        {
            break;
        }
        assert_eq!(browser.evaluate(is_visible).await, true, "{focused}");
        order.push(focused);
    }
    let footer = [
        "Metrics",
        "Health",
        "API description",
        "Jaeger",
        "Prometheus",
        "Grafana",
    ];
    let expected = [&["Português", "Moment", &trace], &footer[..]].concat();
    assert_eq!(order, expected);
    finish(&site, browser, &[]).await;
}

#[tokio::test]
async fn slider_names_the_time_and_the_numbers_of_a_moment() {
    let (site, browser) = (Site::start(&[]), Browser::open().await);
    rush_hour(&site).await;
    browser.goto(&site.url("/")).await;
    browser.until_text(".live", "Live").await;
    let value = "document.getElementById('moment').getAttribute('aria-valuetext')";
    eventually("the newest moment has visits", SOON, async || {
        let value = browser.evaluate(value).await;
        value.as_str().is_some_and(|value| value.contains("median"))
    })
    .await;
    browser
        .evaluate("document.getElementById('moment').focus()")
        .await;
    let cursors = "[...document.querySelectorAll('.cursor')].map((path) => path.getAttribute('d'))";
    assert_eq!(
        browser.evaluate(cursors).await,
        json!(["", ""]),
        "at the newest"
    );
    press(&browser, "ArrowLeft").await;
    assert_eq!(
        browser.evaluate(cursors).await,
        json!(["M592.5 0v100", "M592.5 0v100"])
    );
    // Times are the reader's, three hours behind UTC, and the service's in the attribute.
    let time = browser.text("#moment-time").await;
    let machine = browser
        .evaluate("document.getElementById('moment-time').dateTime")
        .await;
    let hour = |time: &str| time[..2].parse::<i32>().expect("an hour");
    let machine = machine.as_str().expect("a time");
    assert_eq!((hour(&machine[11..]) - hour(&time)).rem_euclid(24), 3);
    let value = browser.evaluate(value).await;
    assert!(
        value.as_str().expect("a text").starts_with(&time),
        "{value}"
    );
    finish(&site, browser, &[]).await;
}

/// A site with all its links.
fn watched_site(collector: &Collector) -> Site {
    Site::start(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &*collector.endpoint()),
        ("JAEGER_PUBLIC_URL", "http://127.0.0.1:16686"),
        ("PROMETHEUS_PUBLIC_URL", "http://127.0.0.1:9090"),
        ("GRAFANA_PUBLIC_URL", "http://127.0.0.1:3000"),
    ])
}

/// Makes visits until the page has a link to Jaeger, as it does once spans are exported.
async fn until_linked_to_its_trace(site: &Site, browser: &Browser) {
    eventually("the page links to the trace", SOON, async || {
        browser.goto(&site.url("/")).await;
        !browser.text("a.trace").await.is_empty()
    })
    .await;
}

/// Makes visits, more and fewer in turn, for a bit more than an interval of the charts; `make
/// picture` fills the charts.
async fn rush_hour(site: &Site) {
    #[expect(clippy::disallowed_methods, reason = "`make picture` sets it")]
    let seconds = std::env::var("RUSH_SECONDS").ok();
    let seconds = seconds.map_or(6, |seconds| seconds.parse().expect("a number"));
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(seconds) {
        site.visit();
        let wave = (start.elapsed().as_secs_f64() / 60.0).sin();
        tokio::time::sleep(Duration::from_secs_f64(1.0 / (60.0 + 30.0 * wave))).await;
    }
}

/// Presses a key.
async fn press(browser: &Browser, key: &str) {
    let code = match key {
        "Tab" => 9,
        "ArrowLeft" => 37,
        _ => panic!("{key} is not known here"),
    };
    for kind in ["keyDown", "keyUp"] {
        let event = json!({"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code});
        browser.tool("Input.dispatchKeyEvent", event).await;
    }
}

/// Nothing of the page lies beyond its right edge.
async fn assert_fits(browser: &Browser) {
    let fits = "document.documentElement.scrollWidth <= innerWidth";
    assert_eq!(browser.evaluate(fits).await, true);
}

/// Closes the browser. After every test, the console has no other errors than these, and
/// every request was to the service.
async fn finish(site: &Site, browser: Browser, expected: &[&str]) {
    let mut errors = browser.console_errors().await;
    errors.retain(|error| !expected.iter().any(|expected| error.contains(expected)));
    assert_eq!(errors, [""; 0]);
    let mut requests = browser.requests().await;
    assert!(!requests.is_empty());
    requests.retain(|url| !url.starts_with(&site.url("/")));
    assert_eq!(requests, [""; 0]);
    browser.close().await;
}
