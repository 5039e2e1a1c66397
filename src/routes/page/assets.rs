//! The page's files, which the program contains. A file's name has a hash of its contents, so a
//! browser never asks for a file again, and never uses the file of another version.
//!
//! Must not know: the page.

use std::fmt::Write as _;
use std::sync::LazyLock;

use axum::body::{Body, Bytes};
use axum::response::{IntoResponse, Response};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderValue, StatusCode, Uri};
use sha2::{Digest as _, Sha256};

/// A file of the page.
struct Asset {
    path: String,
    content_type: &'static str,
    bytes: &'static [u8],
}

impl Asset {
    fn new(stem: &str, extension: &str, content_type: &'static str, bytes: &'static [u8]) -> Self {
        let mut path = format!("/assets/{stem}.");
        for byte in &Sha256::digest(bytes)[..8] {
            // Writing to a string cannot fail.
            let _ = write!(path, "{byte:02x}");
        }
        Self {
            path: format!("{path}.{extension}"),
            content_type,
            bytes,
        }
    }

    fn respond(&self, cache_control: &'static str) -> Response {
        let mut response = Response::new(Body::from(Bytes::from_static(self.bytes)));
        let headers = response.headers_mut();
        for (name, value) in [
            (CONTENT_TYPE, self.content_type),
            (CACHE_CONTROL, cache_control),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        response
    }
}

/// The files that the page names.
struct Assets {
    css: Asset,
    js: Asset,
    icon: Asset,
}

static ASSETS: LazyLock<Assets> = LazyLock::new(|| Assets {
    css: Asset::new(
        "page",
        "css",
        "text/css; charset=utf-8",
        include_bytes!("../../../assets/page.css"),
    ),
    js: Asset::new(
        "page",
        "js",
        "text/javascript; charset=utf-8",
        include_bytes!("../../../assets/page.js"),
    ),
    icon: Asset::new(
        "icon",
        "svg",
        "image/svg+xml",
        include_bytes!("../../../assets/icon.svg"),
    ),
});

const A_YEAR: &str = "public, max-age=31536000, immutable";
/// For files whose names have no hash.
const A_DAY: &str = "public, max-age=86400";

/// Paths of the page's files.
#[derive(Debug, Clone, Copy)]
pub(super) struct AssetUrls {
    pub(super) css: &'static str,
    pub(super) js: &'static str,
    pub(super) icon: &'static str,
}

impl AssetUrls {
    pub(super) fn new() -> Self {
        Self {
            css: &ASSETS.css.path,
            js: &ASSETS.js.path,
            icon: &ASSETS.icon.path,
        }
    }
}

/// Read a file of the page
///
/// The page has the names, which change with the contents.
#[utoipa::path(get, path = "/assets/{file}", operation_id = "getAsset", params(
    ("file" = String, Path, description = "A stem, a hash and an extension.",
        example = "page.0123456789abcdef.css"),
), responses(
    (status = OK, description = "The file.",
        headers(
            ("cache-control" = String, description = "`public, max-age=31536000, immutable`"),
            ("x-content-type-options" = String, description = "`nosniff`"),
        ),
        content(
            (String = "text/css", example = json!("body { margin: 0 }")),
            (String = "text/javascript", example = json!("'use strict'")),
            (String = "image/svg+xml", example = json!("<svg>…</svg>")),
        )),
    (status = NOT_FOUND, description = "There is no such file."),
))]
pub(crate) async fn file(uri: Uri) -> Response {
    let assets = &*ASSETS;
    let named = [&assets.css, &assets.js, &assets.icon]
        .into_iter()
        .find(|asset| asset.path == uri.path());
    match named {
        Some(asset) => asset.respond(A_YEAR),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

/// Read the icon
///
/// Browsers ask for it when they show something else than the page.
#[utoipa::path(get, path = "/favicon.ico", operation_id = "getIcon", responses(
    (status = OK, description = "The icon.", body = String, content_type = "image/svg+xml",
        headers(
            ("cache-control" = String, description = "`public, max-age=86400`"),
            ("x-content-type-options" = String, description = "`nosniff`"),
        ),
        example = json!("<svg>…</svg>")),
))]
pub(crate) async fn favicon() -> Response {
    ASSETS.icon.respond(A_DAY)
}

/// Ask robots to stay away
///
/// Each of their visits would count.
#[utoipa::path(get, path = "/robots.txt", operation_id = "getRobots", responses(
    (status = OK, description = "The rules for robots.", body = String,
        headers(
            ("cache-control" = String, description = "`public, max-age=86400`"),
            ("x-content-type-options" = String, description = "`nosniff`"),
        ),
        example = json!("User-agent: *\nDisallow: /\n")),
))]
pub(crate) async fn robots() -> Response {
    let robots = Asset {
        path: String::new(),
        content_type: "text/plain; charset=utf-8",
        bytes: b"User-agent: *\nDisallow: /\n",
    };
    robots.respond(A_DAY)
}
