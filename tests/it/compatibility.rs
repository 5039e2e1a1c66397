//! The description of the released service is a promise: a client that was written from it still
//! works with this one.

use std::collections::BTreeSet;
use std::path::Path;

use expect_test::expect_file;
use serde_json::{Value, json};

use crate::support::without_stores;

const GOLDEN: &str = "tests/it/description/openapi.json";

/// `UPDATE_EXPECT=1` writes a change that no client can notice. A change that breaks clients on
/// purpose needs the golden file deleted first.
#[tokio::test]
async fn description_is_the_golden_file_and_breaks_no_client() {
    let description = without_stores(&[]).await.get("/openapi.json").await.json();
    if Path::new(GOLDEN).exists() {
        let breaks = breaks(&golden(), &description);
        assert!(breaks.is_empty(), "clients would break: {breaks:#?}");
    }
    let text = serde_json::to_string_pretty(&description).expect("JSON");
    expect_file!["description/openapi.json"].assert_eq(&(text + "\n"));
}

#[test]
fn change_that_breaks_a_client_is_found() {
    let visit = "/components/schemas/Visit";
    let health = "/paths/~1health/get/responses/200";
    for (place, changed) in [
        ("/paths/~1health", Value::Null),
        ("/paths/~1/head", Value::Null),
        ("/paths/~1/get/responses/503", Value::Null),
        (&format!("{health}/content/application~1json"), Value::Null),
        (
            &format!("{health}/content/application~1json/schema"),
            json!({ "type": "string" }),
        ),
        (
            "/paths/~1/get/responses/503/headers/retry-after",
            Value::Null,
        ),
        ("/components/headers/RequestId/required", json!(false)),
        ("/components/headers/Allow", Value::Null),
        ("/components/responses/NotFound", Value::Null),
        (&format!("{visit}/properties/visitas_redis"), Value::Null),
        (
            &format!("{visit}/properties/visitas_redis/type"),
            json!(["integer", "null", "string"]),
        ),
        (
            &format!("{visit}/properties/visitas_redis/type"),
            json!("string"),
        ),
        (
            &format!("{visit}/properties/total_registros_db/minimum"),
            json!(-1),
        ),
        (
            &format!("{visit}/properties/total_registros_db/minimum"),
            Value::Null,
        ),
        (&format!("{visit}/required"), json!(["db_status"])),
        (
            "/components/schemas/Overall/enum",
            json!(["ok", "degraded", "unavailable", "unknown"]),
        ),
        ("/components/schemas/Overall/enum", Value::Null),
        ("/paths/~1metrics/get/parameters/0/required", json!(true)),
        (
            "/paths/~1metrics/get/parameters/0/schema/enum",
            json!(["gzip"]),
        ),
        ("/paths/~1metrics/get/parameters", json!([])),
        (
            "/paths/~1/get/parameters",
            json!([{ "name": "key", "in": "query", "required": true, "schema": { "type": "string" } }]),
        ),
    ] {
        let changed = with(place, changed);
        assert_ne!(breaks(&golden(), &changed), Vec::<String>::new(), "{place}");
    }
}

#[test]
fn addition_breaks_no_client() {
    let visit = "/components/schemas/Visit";
    for (place, changed) in [
        ("/paths/~1new", json!({ "get": { "responses": {} } })),
        ("/paths/~1/get/description", json!("In other words.")),
        (
            "/paths/~1/get/responses/404",
            json!({ "description": "Not there." }),
        ),
        (
            "/paths/~1/get/responses/200/headers/etag",
            json!({ "schema": { "type": "string" } }),
        ),
        ("/paths/~1/get/responses/200/content/text~1csv", json!({})),
        (
            &format!("{visit}/properties/new"),
            json!({ "type": "string" }),
        ),
        (
            &format!("{visit}/properties/visitas_redis/type"),
            json!("integer"),
        ),
        (
            &format!("{visit}/properties/total_registros_db/minimum"),
            json!(2),
        ),
        ("/components/schemas/Overall/enum", json!(["ok"])),
        (
            "/paths/~1metrics/get/parameters/3",
            json!({ "name": "key", "in": "query", "schema": { "type": "string" } }),
        ),
    ] {
        assert_eq!(
            breaks(&golden(), &with(place, changed)),
            Vec::<String>::new(),
            "{place}"
        );
    }
}

fn golden() -> Value {
    let text = std::fs::read_to_string(GOLDEN).expect("the golden file");
    serde_json::from_str(&text).expect("JSON")
}

/// The golden description with another value at a JSON pointer; null removes it.
fn with(place: &str, value: Value) -> Value {
    let mut description = golden();
    let (parent, name) = place.rsplit_once('/').expect("a pointer");
    let name = name.replace("~1", "/");
    match description.pointer_mut(parent).expect(parent) {
        Value::Array(items) => items.push(value),
        Value::Object(entries) if value.is_null() => {
            entries.remove(&name).expect(place);
        }
        Value::Object(entries) => {
            entries.insert(name, value);
        }
        other => panic!("{place}: {other}"),
    }
    description
}

/// What a client of `old` can no longer rely on in `new`.
fn breaks(old: &Value, new: &Value) -> Vec<String> {
    let mut comparison = Comparison {
        old,
        new,
        breaks: Vec::new(),
    };
    comparison.all();
    comparison.breaks
}

struct Comparison<'a> {
    old: &'a Value,
    new: &'a Value,
    breaks: Vec<String>,
}

impl<'a> Comparison<'a> {
    fn all(&mut self) {
        for (path, old) in entries(&self.old["paths"]) {
            for (method, old) in entries(old) {
                let new = &self.new["paths"][path][method];
                let place = format!("{method} {path}");
                self.responses(&place, &old["responses"], &new["responses"]);
                self.parameters(&place, old, new);
            }
        }
        let [old, new] = [self.old, self.new].map(|api| &api["components"]["responses"]);
        self.responses("components", old, new);
    }

    fn responses(&mut self, place: &str, old: &'a Value, new: &'a Value) {
        for (status, old) in entries(old) {
            let place = format!("{place} {status}");
            let Some((old, new)) = self.both(&place, old, &new[status]) else {
                continue;
            };
            for (media, old) in entries(&old["content"]) {
                self.schema(
                    &format!("{place} {media}"),
                    &old["schema"],
                    &new["content"][media]["schema"],
                );
            }
            for (name, old) in entries(&old["headers"]) {
                let place = format!("{place} {name}");
                if let Some((old, new)) = self.both(&place, old, &new["headers"][name]) {
                    self.expect(
                        old["required"] != true || new["required"] == true,
                        &place,
                        "is optional",
                    );
                    self.schema(&place, &old["schema"], &new["schema"]);
                }
            }
        }
    }

    /// A client sends what was accepted before, and no more.
    fn parameters(&mut self, place: &str, old: &'a Value, new: &'a Value) {
        let [old, new] = [(self.old, old), (self.new, new)].map(|(api, operation)| {
            let all = items(&operation["parameters"]);
            all.map(move |parameter| resolved(api, parameter))
                .collect::<Vec<_>>()
        });
        let same = |a: &Value, b: &Value| a["name"] == b["name"] && a["in"] == b["in"];
        for old in &old {
            let place = format!("{place} {}", old["name"]);
            let Some(new) = new.iter().find(|new| same(old, new)) else {
                self.expect(false, &place, "is gone");
                continue;
            };
            // The other way round: the service must accept each value that it accepted.
            let mut accepted = Comparison {
                old: self.new,
                new: self.old,
                breaks: Vec::new(),
            };
            accepted.schema(&place, &new["schema"], &old["schema"]);
            self.breaks.append(&mut accepted.breaks);
        }
        for new in &new {
            let place = format!("{place} {}", new["name"]);
            let was_required = old
                .iter()
                .any(|old| same(old, new) && old["required"] == true);
            self.expect(
                new["required"] != true || was_required,
                &place,
                "is required",
            );
        }
    }

    /// Every value of the new schema must be one of the old schema.
    fn schema(&mut self, place: &str, old: &'a Value, new: &'a Value) {
        let Some((old, new)) = self.both(place, old, new) else {
            return;
        };
        if !old["type"].is_null() {
            let narrower =
                set(&new["type"]).is_subset(&set(&old["type"])) && !new["type"].is_null();
            self.expect(narrower, place, "has another type");
        }
        if !old["enum"].is_null() {
            let narrower =
                set(&new["enum"]).is_subset(&set(&old["enum"])) && !new["enum"].is_null();
            self.expect(narrower, place, "has another value");
        }
        if !old["const"].is_null() {
            self.expect(old["const"] == new["const"], place, "has another value");
        }
        for (bound, sign) in [("minimum", 1.0), ("maximum", -1.0)] {
            if let Some(old) = old[bound].as_f64() {
                let new = new[bound].as_f64();
                self.expect(
                    new.is_some_and(|new| new * sign >= old * sign),
                    place,
                    "has another bound",
                );
            }
        }
        self.expect(
            set(&old["required"]).is_subset(&set(&new["required"])),
            place,
            "lacks a field in some responses",
        );
        for (name, old) in entries(&old["properties"]) {
            self.schema(&format!("{place}.{name}"), old, &new["properties"][name]);
        }
        if !old["items"].is_null() {
            self.schema(&format!("{place}[]"), &old["items"], &new["items"]);
        }
        for (old, new) in items(&old["oneOf"]).zip(items(&new["oneOf"])) {
            self.schema(place, old, new);
        }
        let [old, new] = [old, new].map(|schema| items(&schema["oneOf"]).count());
        self.expect(old == new, place, "is another choice");
    }

    /// Both, without their references, if both are there.
    fn both(
        &mut self,
        place: &str,
        old: &'a Value,
        new: &'a Value,
    ) -> Option<(&'a Value, &'a Value)> {
        if old.is_null() {
            return None;
        }
        self.expect(!new.is_null(), place, "is gone");
        (!new.is_null()).then(|| (resolved(self.old, old), resolved(self.new, new)))
    }

    fn expect(&mut self, fact: bool, place: &str, otherwise: &str) {
        if !fact {
            self.breaks.push(format!("{place} {otherwise}"));
        }
    }
}

/// What a node refers to, or the node.
pub(crate) fn resolved<'a>(api: &'a Value, node: &'a Value) -> &'a Value {
    node["$ref"]
        .as_str()
        .and_then(|reference| api.pointer(reference.trim_start_matches('#')))
        .unwrap_or(node)
}

pub(crate) fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

pub(crate) fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// The items of an array, or the one value.
fn set(value: &Value) -> BTreeSet<String> {
    let one = (!value.is_array() && !value.is_null()).then_some(value);
    items(value).chain(one).map(Value::to_string).collect()
}
