"""What an API server and the two controllers would say of an object, without any of them.

* A structural schema (CRD) becomes a strict JSON Schema: unknown fields are refused, as with
  ``kubectl apply --validate=strict``, after defaults are filled in and list keys are compared.
* CEL rules of the schemas are known one by one, as Python; an unknown one that applies is a fault.
* Rules that KubeRay's and Kueue's own code add, read in their sources (1.7 and 0.19).
* Core kinds, whose OpenAPI is not at hand: names of fields and types, written by hand.
"""

import copy
import re
from pathlib import Path

import jsonschema
import yaml

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?\Z")
LABEL_KEY = re.compile(
    r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?\Z"
)

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class StrictLoader(Loader):
    """Refuses a key given twice, as API servers do."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is given twice: {keys}"
        return super().construct_mapping(node, deep=deep)


def read_documents(text):
    """The objects of a stream."""
    return [document for document in yaml.load_all(text, StrictLoader) if document is not None]


def read_crds(folder: Path):
    """(apiVersion, kind) -> (schema, its validator, scope): the current versions of every CRD."""
    schemas = {}
    for path in sorted(folder.glob("*/*.yaml")):
        spec = yaml.load(path.read_text(), Loader)["spec"]
        for version in spec["versions"]:
            key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
            schema = version["schema"]["openAPIV3Schema"]
            if version["storage"] or not version.get("deprecated"):
                loose = {**schema["properties"], "metadata": {"type": "object"}}
                validator = jsonschema.Draft202012Validator(strict({**schema, "properties": loose}))
                schemas[key] = (schema, validator, spec["scope"])
    return schemas


def strict(schema):
    """A structural schema as JSON Schema that knows no further fields."""
    out = {
        key: value
        for key, value in schema.items()
        if key in ("type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength")
        or key in ("minItems", "maxItems", "required", "minProperties", "maxProperties")
    }
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
    if "items" in schema:
        out["items"] = strict(schema["items"])
    if "properties" in schema:
        out["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
    additional = schema.get("additionalProperties")
    if isinstance(additional, dict):
        out["additionalProperties"] = strict(additional)
    elif "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = bool(additional)
    return out


def fill_defaults(schema, value):
    """What the API server writes into an object before it validates."""
    if isinstance(value, dict):
        for key, inner in schema.get("properties", {}).items():
            if key not in value and "default" in inner:
                value[key] = copy.deepcopy(inner["default"])
        for key, inner in children(schema, value):
            fill_defaults(inner, value[key])
    elif isinstance(value, list):
        for item in value:
            fill_defaults(schema.get("items", {}), item)


def children(schema, value):
    """The fields of a mapping that its schema knows, with their schemas."""
    additional = schema.get("additionalProperties")
    for key in value:
        inner = schema.get("properties", {}).get(key, additional)
        if isinstance(inner, dict):
            yield key, inner


def nodes(schema, value, path=""):
    """(path, schema, value) of everything in an object."""
    yield path, schema, value
    if isinstance(value, dict):
        for key, inner in children(schema, value):
            yield from nodes(inner, value[key], f"{path}.{key}")
    elif isinstance(value, list) and "items" in schema:
        for position, item in enumerate(value):
            yield from nodes(schema["items"], item, f"{path}[{position}]")


def _no_borrowing_without_cohort(spec):
    return "cohortName" in spec or not any(
        "borrowingLimit" in resource
        for group in spec.get("resourceGroups", ())
        for flavor in group["flavors"]
        for resource in flavor["resources"]
    )


CEL = {
    "!has(self.cohortName) && has(self.resourceGroups) ?": _no_borrowing_without_cohort,
    "!has(self.preference) ||": lambda self: "preference" not in self,
    "!(self.reclaimWithinCohort == 'Never'": lambda self: (
        self.get("reclaimWithinCohort") != "Never"
        or self.get("borrowWithinCohort", {}).get("policy", "Never") == "Never"
    ),
    "self.flavors.all(x, size(x.resources) == size(self.coveredResources))": lambda self: all(
        len(flavor["resources"]) == len(self["coveredResources"]) for flavor in self["flavors"]
    ),
    "!has(self.topologyName) ||": lambda self: "topologyName" not in self,
    "self.all(x, !has(x.key) ? x.operator == 'Exists'": lambda self: all(
        "key" in one or one.get("operator") == "Exists" for one in self
    ),
    "self.all(x, has(x.tolerationSeconds) ?": lambda self: all(
        "tolerationSeconds" not in one or one.get("effect") == "NoExecute" for one in self
    ),
    "self.all(x, !has(x.operator) ||": lambda self: all(
        one.get("operator", "Equal") in ("Equal", "Exists") for one in self
    ),
    "self.all(x, has(x.operator) && x.operator == 'Exists' ?": lambda self: all(
        one.get("operator") != "Exists" or "value" not in one for one in self
    ),
    "self.all(x, !has(x.effect) ||": lambda self: all(
        one.get("effect", "NoSchedule") in ("NoSchedule", "PreferNoSchedule", "NoExecute")
        for one in self
    ),
}
"""By their beginnings. Rules about changes (``oldSelf``) do not apply to new objects."""


def faults_by_schema(obj, crds):
    """What an API server with these CRDs would refuse in an object."""
    key = (obj.get("apiVersion"), obj.get("kind"))
    if key not in crds:
        return [f"no schema for {key}, or a deprecated one"]
    schema, validator, scope = crds[key]
    faults = []
    if (scope == "Namespaced") != ("namespace" in obj["metadata"]):
        faults.append(f"{key[1]} is {scope}")
    obj = copy.deepcopy(obj)
    fill_defaults(schema, obj)
    faults += [f"{error.json_path}: {error.message}" for error in validator.iter_errors(obj)]
    for path, inner, value in nodes(schema, obj):
        faults += _faults_of_list(path, inner, value)
        for rule in inner.get("x-kubernetes-validations", ()):
            if "oldSelf" in rule["rule"]:
                continue
            known = [check for start, check in CEL.items() if rule["rule"].startswith(start)]
            if len(known) != 1:
                faults.append(f"{path}: a rule that is not known here: {rule['rule']}")
            elif not known[0](value):
                faults.append(f"{path}: {rule.get('message', rule['rule'])}")
    return faults + faults_of_metadata(obj["metadata"])


def _faults_of_list(path, schema, value):
    kind = schema.get("x-kubernetes-list-type")
    if not isinstance(value, list) or kind not in ("map", "set"):
        return []
    keys = schema.get("x-kubernetes-list-map-keys", ())
    items = [repr([item.get(key) for key in keys] if kind == "map" else item) for item in value]
    return [] if len(items) == len(set(items)) else [f"{path}: items repeat"]


def faults_of_metadata(metadata):
    """Names, labels and annotations, as every API server checks them."""
    known = {"name", "namespace", "labels", "annotations"}
    faults = [f"metadata.{key} is unknown" for key in metadata if key not in known]
    if not LABEL.match(metadata.get("name", "")):
        faults.append("metadata.name")
    if not LABEL.match(metadata.get("namespace", "a")):
        faults.append("metadata.namespace")
    for key, value in metadata.get("labels", {}).items():
        if not (LABEL_KEY.match(key) and isinstance(value, str) and LABEL_VALUE.match(value)):
            faults.append(f"label {key}: {value!r}")
    for key, value in metadata.get("annotations", {}).items():
        if not (LABEL_KEY.match(key) and isinstance(value, str)):
            faults.append(f"annotation {key}")
    return faults


def faults_by_controllers(obj):
    """What KubeRay and Kueue refuse, of what bears on these jobs, and a CRD cannot say."""
    if obj["kind"] not in ("RayJob", "RayCluster"):
        return []
    faults = []
    metadata, spec = obj["metadata"], obj["spec"]
    cluster = spec["rayClusterSpec"] if obj["kind"] == "RayJob" else spec
    longest = 47 if obj["kind"] == "RayJob" else 53
    if len(metadata["name"]) > longest or not metadata["name"][0].isalpha():
        faults.append("metadata.name is too long, or no DNS-1035 label")
    if obj["kind"] == "RayJob":
        if not spec.get("shutdownAfterJobFinishes") and (
            spec.get("suspend") or spec.get("ttlSecondsAfterFinished")
        ):
            faults.append("suspend and ttlSecondsAfterFinished need shutdownAfterJobFinishes")
        for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
            if spec.get(name, 1) <= 0:
                faults.append(f"{name} must be positive")
        if spec.get("backoffLimit", 0) < 0:
            faults.append("backoffLimit is negative")
    version = tuple(int(part) for part in cluster.get("rayVersion", "0").split("."))
    if cluster.get("authOptions", {}).get("mode") == "token" and version < (2, 52, 0):
        faults.append("authOptions.mode token needs Ray 2.52")
    is_elastic = cluster.get("enableInTreeAutoscaling", False)
    groups = cluster.get("workerGroupSpecs", ())
    for group in [cluster["headGroupSpec"], *groups]:
        policy = group["template"]["spec"].get("restartPolicy", "Never")
        if is_elastic and policy != "Never":
            faults.append("restartPolicy must be Never with the autoscaler v2")
    for group in groups:
        if not 0 <= group["minReplicas"] <= group["maxReplicas"]:
            faults.append(f"{group['groupName']}: minReplicas, maxReplicas")
        if not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            faults.append(f"{group['groupName']}: replicas")
    if "kueue.x-k8s.io/queue-name" in metadata.get("labels", {}):
        elastic_job = metadata.get("annotations", {}).get("kueue.x-k8s.io/elastic-job")
        if is_elastic and elastic_job != "true":
            faults.append("Kueue: autoscaling needs the annotation elastic-job")
        if not spec.get("suspend"):
            faults.append("Kueue: a job that waits is suspended")
        if obj["kind"] == "RayJob" and not spec.get("shutdownAfterJobFinishes"):
            faults.append("Kueue: shutdownAfterJobFinishes")
        if len(groups) > 17:
            faults.append("Kueue: at most 17 worker groups")
    return faults


def _object(required=(), /, **properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _array(items):
    return {"type": "array", "items": items}


STRING, INTEGER, BOOLEAN = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
STRINGS = {"type": "object", "additionalProperties": STRING}
SELECTOR = _object(matchLabels=STRINGS)
PORTS = _array(
    _object(
        ("port",),
        protocol={"enum": ["TCP", "UDP", "SCTP"]},
        port={"type": "integer", "minimum": 1, "maximum": 65535},
    )
)
PEERS = _array(
    _object(
        podSelector=SELECTOR,
        namespaceSelector=SELECTOR,
        ipBlock=_object(("cidr",), cidr={"type": "string", "pattern": r"^[0-9.]+/[0-9]+$"}),
    )
)
CORE_SPECS = {
    ("v1", "Namespace"): {},
    ("v1", "ServiceAccount"): {"automountServiceAccountToken": BOOLEAN},
    ("networking.k8s.io/v1", "NetworkPolicy"): {
        "spec": _object(
            ("podSelector", "policyTypes"),
            podSelector=SELECTOR,
            policyTypes=_array({"enum": ["Ingress", "Egress"]}),
            ingress=_array(_object(**{"from": PEERS, "ports": PORTS})),
            egress=_array(_object(to=PEERS, ports=PORTS)),
        )
    },
    ("policy/v1", "PodDisruptionBudget"): {
        "spec": _object(("minAvailable", "selector"), minAvailable=INTEGER, selector=SELECTOR)
    },
}
"""The fields that are used here, and no others."""


def faults_of_core_kind(obj):
    """What is wrong with an object of a kind that has no CRD; None for other kinds."""
    key = (obj.get("apiVersion"), obj.get("kind"))
    if key not in CORE_SPECS:
        return None
    schema = _object(
        ("apiVersion", "kind", "metadata", *(name for name in CORE_SPECS[key] if name == "spec")),
        apiVersion=STRING,
        kind=STRING,
        metadata={"type": "object"},
        **CORE_SPECS[key],
    )
    errors = jsonschema.Draft202012Validator(schema).iter_errors(obj)
    faults = [f"{error.json_path}: {error.message}" for error in errors]
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        for rule in obj.get("spec", {}).get(direction, ()):
            if direction.capitalize() not in obj["spec"]["policyTypes"]:
                faults.append(f"{direction} rules without their policy type")
            faults += ["an empty list of peers means all" for _ in [0] if rule.get(peers) == []]
    return faults + faults_of_metadata(obj["metadata"])
