//! Logs and traces.

use super::*;

#[test]
fn whitespace_between_directives_is_left_out() {
    let filter = |text: &str| serve("", &[("RUST_LOG", text)]).telemetry.log.filter;
    assert_eq!(filter("info, visitas=debug"), "info,visitas=debug");
    assert_eq!(filter("\u{2003}\u{e9}=info\n"), "\u{e9}=info");
    error("", &[("RUST_LOG", "\u{2003}")]);
}

#[test]
fn logs_are_pretty_on_a_terminal_unless_a_setting_says_otherwise() {
    let format = |terminal, environment: &[(&str, &str)]| match parse(
        ["visitas".into()],
        &lookup(environment),
        terminal,
    ) {
        Ok(Command::Serve(config)) => config.telemetry.log.format,
        other => panic!("{other:?}"),
    };
    assert_eq!(format(true, &[]), LogFormat::Pretty);
    assert_eq!(format(false, &[]), LogFormat::Json);
    assert_eq!(format(true, &[("LOG_FORMAT", "JSON")]), LogFormat::Json);
    assert_eq!(
        format(false, &[("LOG_FORMAT", "pretty")]),
        LogFormat::Pretty
    );
}

#[test]
fn spans_are_exported_only_to_an_endpoint() {
    let exporter = |environment: &[(&str, &str)]| {
        serve("", environment)
            .telemetry
            .traces
            .expect("traces")
            .exporter
    };
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://jaeger:4318/base/");
    assert!(exporter(&[]).is_none());
    assert!(exporter(&[endpoint, ("OTEL_TRACES_EXPORTER", "none")]).is_none());
    let base = exporter(&[endpoint]).expect("an exporter");
    assert_eq!(base.endpoint, "https://jaeger:4318/base/v1/traces");
    let specific = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://tempo/as/is/");
    let specific = exporter(&[endpoint, specific]).expect("an exporter");
    assert_eq!(specific.endpoint, "http://tempo/as/is/");
}

#[test]
fn disabled_sdk_means_no_traces() {
    let traces = serve("", &[("OTEL_SDK_DISABLED", "TRUE")]).telemetry.traces;
    assert!(traces.is_none());
}

#[test]
fn settings_for_traces_win_over_general_ones() {
    let exporter = exporter(&[
        ("OTEL_EXPORTER_OTLP_HEADERS", "a=general,b=too"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "a=b%2Cc%3D, x = y="),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "1"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "none"),
        ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "gzip"),
    ]);
    let headers: Vec<(&str, &str)> = exporter
        .headers
        .iter()
        .map(|(name, value)| (name.as_str(), value.expose()))
        .collect();
    assert_eq!(headers, [("a", "b,c="), ("x", "y=")]);
    assert_eq!(exporter.timeout, Duration::from_millis(2));
    assert_eq!(exporter.compression, Compression::Gzip);
}

#[test]
fn general_settings_hold_for_traces() {
    let exporter = exporter(&[
        ("OTEL_EXPORTER_OTLP_HEADERS", "a=general"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "7"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
    ]);
    assert_eq!(exporter.headers.len(), 1);
    assert_eq!(exporter.timeout, Duration::from_millis(7));
    assert_eq!(exporter.compression, Compression::Gzip);
}

#[test]
fn shorter_of_the_two_export_deadlines_holds() {
    let batch = ("OTEL_BSP_EXPORT_TIMEOUT", "300");
    assert_eq!(exporter(&[batch]).timeout, Duration::from_millis(300));
    let otlp = ("OTEL_EXPORTER_OTLP_TIMEOUT", "200");
    assert_eq!(exporter(&[batch, otlp]).timeout, Duration::from_millis(200));
}

#[test]
fn sampler_takes_a_ratio_only_if_it_is_one_of_ratios() {
    let sampler = |environment: &[(&str, &str)]| {
        serve("", environment)
            .telemetry
            .traces
            .expect("traces")
            .sampler
    };
    let (parent_based, root) = (true, Root::AlwaysOn);
    assert_eq!(sampler(&[]), Sampler { parent_based, root });
    let ratio = ("OTEL_TRACES_SAMPLER", "traceidratio");
    assert_eq!(sampler(&[ratio]).root, Root::Ratio(1.0));
    let argument = ("OTEL_TRACES_SAMPLER_ARG", "0.25");
    let (parent_based, root) = (false, Root::Ratio(0.25));
    assert_eq!(sampler(&[ratio, argument]), Sampler { parent_based, root });
    let line = error("", &[argument]);
    assert!(
        line.starts_with("OTEL_TRACES_SAMPLER_ARG=\"0.25\""),
        "{line}"
    );
}

#[test]
fn service_name_is_the_setting_then_the_attribute() {
    let attributes = (
        "OTEL_RESOURCE_ATTRIBUTES",
        "service.name=attribute,team=a%2Cb",
    );
    let traces =
        |environment: &[(&str, &str)]| serve("", environment).telemetry.traces.expect("traces");
    let by_attribute = traces(&[attributes]);
    assert_eq!(by_attribute.service_name, "attribute");
    assert_eq!(
        by_attribute.resource_attributes,
        [("team".to_owned(), "a,b".to_owned())]
    );
    let by_setting = traces(&[attributes, ("OTEL_SERVICE_NAME", "setting")]);
    assert_eq!(by_setting.service_name, "setting");
    assert_eq!(by_setting.resource_attributes.len(), 1);
    assert_eq!(traces(&[]).service_name, "visitas");
}

#[test]
fn malformed_pairs_are_refused() {
    for pairs in ["a", "a=b,", "=b", "a=%", "a=%zz", "a=%ff", "a=b,a=c"] {
        let line = error("", &[("OTEL_RESOURCE_ATTRIBUTES", pairs)]);
        assert!(line.starts_with("OTEL_RESOURCE_ATTRIBUTES="), "{line}");
    }
}

#[test]
fn batch_of_spans_fits_in_the_queue() {
    let line = error("", &[("OTEL_BSP_MAX_QUEUE_SIZE", "511")]);
    assert!(
        line.contains("OTEL_BSP_MAX_EXPORT_BATCH_SIZE=\"512\" (default)"),
        "{line}"
    );
    assert!(line.contains("OTEL_BSP_MAX_QUEUE_SIZE=\"511\""), "{line}");
    serve("", &[("OTEL_BSP_MAX_QUEUE_SIZE", "512")]);
}

#[test]
fn propagators_are_a_list_of_those_that_are_known_or_none() {
    let trace_context = |list: &str| {
        serve("", &[("OTEL_PROPAGATORS", list)])
            .telemetry
            .trace_context
    };
    assert!(serve("", &[]).telemetry.trace_context);
    for list in [
        "tracecontext",
        "tracecontext,baggage",
        "baggage, tracecontext",
        "tracecontext,tracecontext",
        "TraceContext",
    ] {
        assert!(trace_context(list), "{list}");
    }
    for list in [
        "baggage",
        "baggage,baggage",
        "none",
        "None",
        " none ",
        "none,none",
    ] {
        assert!(!trace_context(list), "{list}");
    }
    for list in [
        "b3",
        "b3multi",
        "jaeger",
        "xray",
        "ottrace",
        "tracecontext,b3",
        "none,tracecontext",
        "baggage,none",
        "tracecontext,",
        ",",
        " ",
        "tracecontext baggage",
        "tracecontext;baggage",
    ] {
        let line = error("", &[("OTEL_PROPAGATORS", list)]);
        assert!(line.starts_with("OTEL_PROPAGATORS="), "{line}");
        error(
            "",
            &[("OTEL_PROPAGATORS", list), ("OTEL_SDK_DISABLED", "true")],
        );
    }
    let disabled = [("OTEL_SDK_DISABLED", "true"), ("OTEL_PROPAGATORS", "none")];
    assert!(!serve("", &disabled).telemetry.trace_context);
}

#[test]
fn limit_of_spans_wins_over_the_general_one_and_both_are_bounded() {
    let limit = |environment: &[(&str, &str)]| {
        let traces = serve("", environment).telemetry.traces;
        traces.expect("traces").value_length_limit
    };
    let general = ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "100");
    let of_spans = ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "200");
    assert_eq!(limit(&[]), 512);
    assert_eq!(limit(&[general]), 100);
    assert_eq!(limit(&[of_spans]), 200);
    assert_eq!(limit(&[general, of_spans]), 200);
    for bad in ["0", "4097", "-1", "1.5", "1k"] {
        for variable in [general.0, of_spans.0] {
            error("", &[(variable, bad)]);
        }
    }
}
