//! Chromium, driven through its driver, and what it has seen. It knows nothing of the page.

use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use lab::process::{self, Process};
use lab::wait::{SOON, eventually};
use lab::{client, ports, program};
use serde_json::{Value, json};
use thirtyfour::{
    ChromiumLikeCapabilities as _, DesiredCapabilities, LoggingPrefsLogLevel, WebDriver,
};

/// The accessibility rules: `tests/browser.sh` downloads them.
const AXE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/axe/axe.min.js");

/// A browser with one window.
pub(crate) struct Browser {
    /// Dropped first: that closes the browser, also after a panic, when the session is still open
    /// and would be closed by a call that waits.
    _chromedriver: Process,
    pub(crate) driver: WebDriver,
}

/// How the page is looked at.
#[derive(Clone, Copy)]
pub(crate) struct Look {
    pub(crate) width: u32,
    pub(crate) scheme: &'static str,
}

pub(crate) const LIGHT: Look = Look {
    width: 900,
    scheme: "light",
};
pub(crate) const DARK: Look = Look {
    scheme: "dark",
    ..LIGHT
};
/// The narrowest width that WCAG asks for (1.4.10, reflow).
pub(crate) const NARROW: Look = Look {
    width: 320,
    ..LIGHT
};

impl Browser {
    /// Opens a browser in a time zone that is not UTC and that has no summer time.
    pub(crate) async fn open() -> Self {
        let address = ports::free_address().expect("a free port");
        let mut command = process::command("chromedriver");
        command
            .arg(format!("--port={}", address.port()))
            .env("TZ", "America/Sao_Paulo");
        let log = folder("bench").join(format!("chromedriver-{}.log", address.port()));
        let chromedriver = Process::start(command, &log).expect("chromedriver starts");
        eventually("chromedriver listens", SOON, async || {
            client::get(address, "/status").is_ok()
        })
        .await;
        let mut wanted = DesiredCapabilities::chrome();
        for argument in [
            "--headless=new",
            // It opens only the service under test, and root has no sandbox.
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            // Closes the browser when chromedriver ends, however it ends.
            "--remote-debugging-pipe",
        ] {
            wanted.add_arg(argument).expect("an argument");
        }
        for log in ["browser", "performance"] {
            wanted
                .set_logging_prefs(log, LoggingPrefsLogLevel::All)
                .expect("a log");
        }
        let driver = WebDriver::new(format!("http://{address}"), wanted).await;
        let browser = Self {
            _chromedriver: chromedriver,
            driver: driver.expect("a browser"),
        };
        browser.look(LIGHT).await;
        browser
    }

    /// Sends a command of Chromium's tools.
    pub(crate) async fn tool(&self, command: &str, parameters: Value) -> Value {
        let sent = self.driver.cdp().send_raw(command, parameters).await;
        sent.unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// Sets the width and the colour scheme.
    pub(crate) async fn look(&self, look: Look) {
        let size =
            json!({"width": look.width, "height": 900, "deviceScaleFactor": 1, "mobile": false});
        self.tool("Emulation.setDeviceMetricsOverride", size).await;
        let media = json!({"features": [
            {"name": "prefers-color-scheme", "value": look.scheme},
            // So that a picture does not depend on the moment.
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]});
        self.tool("Emulation.setEmulatedMedia", media).await;
    }

    /// Asks for pages in these languages, as the browser's settings would.
    pub(crate) async fn prefer(&self, languages: &str) {
        self.tool("Network.enable", json!({})).await;
        let headers = json!({"headers": {"Accept-Language": languages}});
        self.tool("Network.setExtraHTTPHeaders", headers).await;
    }

    /// Opens an address.
    pub(crate) async fn goto(&self, url: &str) {
        self.driver.goto(url).await.expect("the page opens");
    }

    /// What an expression of JavaScript yields.
    pub(crate) async fn evaluate(&self, expression: &str) -> Value {
        let script = format!("return {expression}");
        let result = self.driver.execute(script, Vec::new()).await;
        let result = result.unwrap_or_else(|error| panic!("{expression}: {error}"));
        result.json().clone()
    }

    /// The text that a person sees in an element; nothing if it is hidden or not there.
    pub(crate) async fn text(&self, selector: &str) -> String {
        let element = format!("document.querySelector({})", json!(selector));
        let text = format!("{element}?.checkVisibility() ? {element}.innerText : ''");
        let text = self.evaluate(&text).await;
        text.as_str().expect("a text").replace('\u{a0}', " ")
    }

    /// Waits until an element has a text.
    pub(crate) async fn until_text(&self, selector: &str, part: &str) {
        self.until_text_within(selector, part, SOON).await;
    }

    pub(crate) async fn until_text_within(&self, selector: &str, part: &str, timeout: Duration) {
        let what = format!("{selector} has {part:?}");
        eventually(&what, timeout, async || {
            self.text(selector).await.contains(part)
        })
        .await;
    }

    /// Saves a picture of the whole page.
    pub(crate) async fn picture(&self, name: &str) {
        let height = self.evaluate("document.documentElement.scrollHeight").await;
        let width = self.evaluate("innerWidth").await;
        let clip = json!({"x": 0, "y": 0, "width": width, "height": height, "scale": 1});
        let picture = json!({"captureBeyondViewport": true, "clip": clip});
        let picture = self.tool("Page.captureScreenshot", picture).await;
        let picture = picture["data"].as_str().expect("a picture");
        let picture = BASE64_STANDARD.decode(picture).expect("base64");
        let file = folder("screenshots").join(format!("{name}.png"));
        std::fs::write(file, picture).expect("a file");
    }

    /// What axe-core has against the page, one line for each element.
    pub(crate) async fn violations(&self) -> Vec<String> {
        let axe = std::fs::read_to_string(AXE).expect("`make browser` downloads axe-core");
        // Through the tools, because the page's security policy forbids other scripts.
        self.tool("Runtime.evaluate", json!({"expression": axe}))
            .await;
        let run = "axe.run().then((result) => result.violations.flatMap((rule) => \
            rule.nodes.map((node) => `${rule.id}: ${node.target} ${node.failureSummary}`)))";
        let run = json!({"expression": run, "awaitPromise": true, "returnByValue": true});
        let result = self.tool("Runtime.evaluate", run).await;
        let violations = result["result"]["value"].as_array();
        let violations = violations.unwrap_or_else(|| panic!("{result}"));
        let line = |value: &Value| value.as_str().expect("a line").to_owned();
        violations.iter().map(line).collect()
    }

    /// The errors in the console, so far.
    pub(crate) async fn console_errors(&self) -> Vec<String> {
        let log = self.driver.browser_log().await.expect("the console");
        let errors = log.into_iter().filter(|line| line.level == "SEVERE");
        errors.map(|line| line.message).collect()
    }

    /// The addresses of all requests, so far.
    pub(crate) async fn requests(&self) -> Vec<String> {
        let log = self.driver.get_log("performance").await.expect("the log");
        let events = log.iter().map(|line| {
            let event: Value = serde_json::from_str(&line.message).expect("JSON");
            event["message"].clone()
        });
        let requests = events.filter(|event| event["method"] == "Network.requestWillBeSent");
        let url = |event: Value| {
            event["params"]["request"]["url"]
                .as_str()
                .map(str::to_owned)
        };
        requests.filter_map(url).collect()
    }

    /// Closes the browser.
    pub(crate) async fn close(self) {
        self.driver.quit().await.expect("the browser closes");
    }
}

/// A folder in cargo's target folder.
fn folder(name: &str) -> PathBuf {
    let scratch = program::scratch().expect("a folder");
    let folder = scratch.with_file_name(name);
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}
