"""JSON schemas of the fields of custom resources that deploy/ uses; other fields are errors.

References: KEDA 2.20, "ScaledObject specification"; Prometheus Operator 0.93, "API reference", ServiceMonitor; KServe
0.20, "Control plane API", InferenceService v1beta1.
"""

from typing import Any

TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
DURATION = {"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"}


def describe(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """Return the schema of an object with these required and optional fields."""
    properties = {**required, **optional}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def list_of(element: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a list with at least one element."""
    return {"type": "array", "items": element, "minItems": 1}


TEXTS = {"type": "object", "additionalProperties": TEXT}

SCALING_RULES = describe(
    {"policies": list_of(describe({"type": {"enum": ["Pods", "Percent"]}, "value": COUNT, "periodSeconds": COUNT}))},
    stabilizationWindowSeconds={"type": "integer", "minimum": 0, "maximum": 3600},
)

SCALED_OBJECT = describe(
    {
        "scaleTargetRef": describe({"name": TEXT}),
        "triggers": list_of(
            describe(
                {
                    "type": {"const": "prometheus"},
                    # All values are texts.
                    "metadata": describe(
                        {"serverAddress": TEXT, "query": TEXT, "threshold": {"type": "string", "pattern": "^[0-9.]+$"}},
                        ignoreNullValues={"enum": ["true", "false"]},
                    ),
                },
                metricType={"enum": ["AverageValue", "Value"]},
            )
        ),
    },
    minReplicaCount=COUNT,
    maxReplicaCount=COUNT,
    pollingInterval=COUNT,
    fallback=describe(
        {"failureThreshold": COUNT, "replicas": COUNT},
        behavior={
            "enum": [
                "static",
                "currentReplicas",
                "currentReplicasIfHigher",
                "currentReplicasIfLower",
                "scalingModifiers",
            ]
        },
    ),
    advanced=describe(
        {
            "horizontalPodAutoscalerConfig": describe(
                {"behavior": describe({"scaleUp": SCALING_RULES, "scaleDown": SCALING_RULES})}
            )
        }
    ),
)

SERVICE_MONITOR = describe(
    {
        "selector": describe({"matchLabels": TEXTS}),
        "endpoints": list_of(
            describe(
                {"port": TEXT},
                path={"type": "string", "pattern": "^/"},
                interval=DURATION,
                scrapeTimeout=DURATION,
                authorization=describe({"credentials": describe({"name": TEXT, "key": TEXT})}),
            )
        ),
    }
)

PREDICTOR_FIELDS: dict[str, Any] = {
    "minReplicas": COUNT,
    "maxReplicas": COUNT,
    "scaleMetric": {"enum": ["cpu", "memory", "concurrency", "rps"]},
    "scaleTarget": COUNT,
    "timeout": COUNT,
    "deploymentStrategy": describe(
        {"type": {"enum": ["RollingUpdate", "Recreate"]}},
        rollingUpdate=describe({}, maxSurge=COUNT, maxUnavailable=COUNT),
    ),
}
"""Fields of a predictor in addition to those of a pod."""

CUSTOM_RESOURCES = {
    ("keda.sh/v1alpha1", "ScaledObject"): SCALED_OBJECT,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): SERVICE_MONITOR,
}
"""Schemas of the field `spec` by API version and kind."""
