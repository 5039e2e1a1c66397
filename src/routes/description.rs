//! `GET /openapi.json`: the description of every route, in OpenAPI 3.1.
//!
//! Each handler declares its own part, from which the router also takes its path and method. This
//! file adds what the layers and the server do to every route. There is no page that renders it: it
//! would be another program's page, served as ours.
//!
//! Must not know: any other route.

use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use serde_json::{Map, Value, json};
use utoipa::openapi::{InfoBuilder, License};
use utoipa::{OpenApi as _, ToSchema as _, openapi};

use super::health::Report;
use super::page::PAGE_HEADERS;
use super::problem::{self, Problem};

/// The description as it is sent.
#[derive(Debug, Clone)]
pub(super) struct Description(Bytes);

/// What the description says about all routes.
const ABOUT: &str = "Records each visit in Postgres, counts it in Redis and responds with both \
    totals. No request has a body. Another path is 404 (`NotFound` of the components), another \
    method 405 (`MethodNotAllowed`). Headers that are too many or too large are 431, and bytes \
    that are not HTTP/1 are 400, both without a body. No response has the text of a store's error.";

/// Every problem document: its name, its status and when it occurs.
const PROBLEMS: [(&str, StatusCode, &str); 5] = [
    (
        "BadRequest",
        StatusCode::BAD_REQUEST,
        "The request does not name exactly one valid host (RFC 9112, section 3.2).",
    ),
    ("NotFound", StatusCode::NOT_FOUND, "There is no such path."),
    (
        "MethodNotAllowed",
        StatusCode::METHOD_NOT_ALLOWED,
        "The path has no such method.",
    ),
    (
        "InternalServerError",
        StatusCode::INTERNAL_SERVER_ERROR,
        "The handler failed, which is a bug. The log has the request's id.",
    ),
    (
        "TooManyStreams",
        StatusCode::SERVICE_UNAVAILABLE,
        "`PAGE_STREAMS_MAX` streams are open.",
    ),
];
/// The problems that any request can cause.
const OF_EVERY_ROUTE: [StatusCode; 2] =
    [StatusCode::BAD_REQUEST, StatusCode::INTERNAL_SERVER_ERROR];

/// What handlers do not name where utoipa looks for it.
#[derive(utoipa::OpenApi)]
#[openapi(components(schemas(Problem, Report)))]
struct Unnamed;

/// This description
#[utoipa::path(get, path = "/openapi.json", operation_id = "getDescription", responses(
    (status = OK, description = "An OpenAPI 3.1 document.", body = Object,
        headers(("cache-control" = String, description = "It changes with the program only.")),
        example = json!({ "openapi": "3.1.0", "info": { "title": "visitas", "version": "0.1.0" } })),
))]
pub(super) async fn serve(State(Description(document)): State<Description>) -> Response {
    let headers = [
        (CONTENT_TYPE, "application/json"),
        (CACHE_CONTROL, "public, max-age=300"),
    ];
    (headers, document).into_response()
}

impl Description {
    /// Completes what the handlers declare. A response of a route that is not `traced` has no
    /// trace.
    pub(super) fn new(mut api: openapi::OpenApi, traced: fn(route: &str) -> bool) -> Self {
        api.info = InfoBuilder::new()
            .title("visitas")
            .version(crate::VERSION)
            .description(Some(ABOUT))
            .license(Some(License::new("MIT")))
            .build();
        api.merge(Unnamed::openapi());
        // Strings as keys and plain values always serialise.
        let mut api = serde_json::to_value(&api).unwrap_or_default();
        for (path, item) in entries(&mut api["paths"]) {
            for (_method, operation) in entries(item) {
                complete_operation(operation, traced(path));
            }
            if let (Some(get), None) = (item.get("get"), item.get("head")) {
                item["head"] = head_of(get.clone());
            }
            for (_status, response) in entries(&mut item["head"]["responses"]) {
                response
                    .as_object_mut()
                    .map(|response| response.remove("content"));
            }
        }
        complete_components(&mut api["components"]);
        Self(Bytes::from(api.to_string()))
    }
}

/// `HEAD` is `GET` without the body, unless a handler declares it.
fn head_of(mut operation: Value) -> Value {
    let id = operation["operationId"].as_str().unwrap_or_default();
    operation["operationId"] = json!(format!("{id}Head"));
    operation["description"] = json!("As `GET`, without the body.");
    operation
}

/// Adds the headers that every request can have, those that the layers and the page add to a
/// response, and the problems that every request can cause.
fn complete_operation(operation: &mut Value, traced: bool) {
    for status in OF_EVERY_ROUTE {
        operation["responses"][status.as_str()] = json!({});
    }
    for (status, response) in entries(&mut operation["responses"]) {
        let problem = PROBLEMS
            .iter()
            .find(|(_, code, _)| code.as_str() == status && response.get("content").is_none());
        if let Some((name, _, _)) = problem {
            *response = reference("responses", name);
            continue;
        }
        for (_name, header) in entries(&mut response["headers"]) {
            header["required"] = json!(!take_optional(header));
        }
        if response["content"].get("text/html").is_some() {
            for name in PAGE_HEADERS {
                response["headers"][name] = reference("headers", name);
            }
        }
        add_layers_headers(&mut response["headers"], traced);
    }
    let mut parameters = operation["parameters"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    for parameter in &mut parameters {
        take_optional(parameter);
    }
    parameters.extend(["RequestId", "TraceParent"].map(|name| reference("parameters", name)));
    operation["parameters"] = Value::Array(parameters);
}

fn reference(kind: &str, name: &str) -> Value {
    json!({ "$ref": format!("#/components/{kind}/{name}") })
}

/// Whether a handler declares this value as an `Option`: it can be absent. Then removes `null` from its
/// types, which no header has.
fn take_optional(declared: &mut Value) -> bool {
    let types = &mut declared["schema"]["type"];
    let first = types.as_array().and_then(|types| types.first()).cloned();
    first.map(|first| *types = first).is_some()
}

fn add_layers_headers(headers: &mut Value, traced: bool) {
    let mut add = |name: &str, component: &str| {
        if headers.get(name).is_none() {
            headers[name] = reference("headers", component);
        }
    };
    add("x-request-id", "RequestId");
    add("cache-control", "NotStored");
    if traced {
        add("traceresponse", "TraceResponse");
    }
}

fn complete_components(components: &mut Value) {
    components["parameters"] = json!({
        "RequestId": {
            "name": "x-request-id", "in": "header", "schema": { "type": "string" },
            "description": "The request's id in the response and in the log. Replaced unless it \
                is 1 to 128 visible ASCII characters.",
            "example": "pedido-7",
        },
        "TraceParent": {
            "name": "traceparent", "in": "header", "schema": { "type": "string" },
            "description": "The trace that the request belongs to (W3C Trace Context). Ignored if \
                it is malformed.",
            "example": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        },
    });
    components["headers"] = json!({
        "RequestId": {
            "required": true, "schema": { "type": "string", "minLength": 1, "maxLength": 128 },
            "description": "The request's id, as in the log.",
            "example": "e4b51c4b3b0f4f0fa8a0fd7f0c1b2a39",
        },
        "NotStored": {
            "required": true, "schema": { "type": "string", "const": "no-store" },
            "description": "The response is true at its own moment only.",
        },
        "TraceResponse": {
            "schema": { "type": "string", "pattern": "^00-[0-9a-f]{32}-[0-9a-f]{16}-01$" },
            "description": "The trace and the span of a request that is sampled (W3C draft).",
            "example": "00-4bf92f3577b34da6a3ce929d0e0e4736-53995c3f42cd8ad8-01",
        },
        "Allow": {
            "required": true, "schema": { "type": "string" },
            "description": "The path's methods.", "example": "GET,HEAD",
        },
    });
    for name in PAGE_HEADERS {
        components["headers"][name] = json!({
            "schema": { "type": "string" },
            "description": "On the page only.",
        });
    }
    let problem = reference("schemas", &Problem::name());
    for (name, status, when) in PROBLEMS {
        let content = json!({ "schema": problem, "example": Problem::new(status) });
        let mut headers = json!({});
        if status == StatusCode::METHOD_NOT_ALLOWED {
            headers["allow"] = reference("headers", "Allow");
        }
        // The server refuses a bad request before any layer sees it.
        if status == StatusCode::BAD_REQUEST {
            headers["cache-control"] = reference("headers", "NotStored");
        } else {
            add_layers_headers(&mut headers, true);
        }
        components["responses"][name] = json!({
            "description": when,
            "headers": headers,
            "content": { problem::MEDIA_TYPE: content },
        });
    }
}

/// The entries of an object; none of anything else.
fn entries(value: &mut Value) -> impl Iterator<Item = (&String, &mut Value)> {
    value.as_object_mut().into_iter().flat_map(Map::iter_mut)
}
