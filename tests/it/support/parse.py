"""Reads an exposition with the parsers of prometheus_client, which are the formats' reference.

usage: parse.py text|openmetrics <exposition >families (JSON)
"""

import json
import sys


def families(format, exposition):
    if format == "openmetrics":
        from prometheus_client.openmetrics.parser import text_string_to_metric_families
    else:
        from prometheus_client.parser import text_string_to_metric_families
    for family in text_string_to_metric_families(exposition):
        yield {
            "name": family.name,
            "kind": family.type,
            "unit": getattr(family, "unit", ""),
            "help": family.documentation,
            "samples": [sample(sample_) for sample_ in family.samples],
        }


def sample(sample):
    return {
        "name": sample.name,
        # The formats write the bound of a bucket in two ways.
        "labels": {
            name: str(float(value)) if name == "le" else value
            for name, value in sample.labels.items()
        },
        "value": str(float(sample.value)),
        "exemplar": sample.exemplar
        and {
            "labels": sample.exemplar.labels,
            "value": sample.exemplar.value,
            "timestamp": float(sample.exemplar.timestamp),
        },
    }


print(json.dumps(list(families(sys.argv[1], sys.stdin.read()))))
