"""`deploy/` cannot break unseen: manifests and units are held against their formats, each other and the programs."""

import ast
import contextlib
import copy
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from lmcache_api.__main__ import parser as api_parser
from lmcache_api.pytest_plugin import free_port
from lmcache_frontend.nodes.node import Node, read_list
from lmcache_frontend.nodes.registry import Registry
from lmcache_frontend.options import DEFINITIONS as OPTIONS
from lmcache_frontend.options import ENV_PREFIX, Options, flag_of, read_options
from lmcache_frontend.server import DRAIN_SECONDS
from lmcache_shared import config
from lmcache_shared.errors import OpsError
from lmcache_shared.placement import CONTROLLER_INDEX, place
from lmcache_shared.settings import DEFINITIONS as SETTINGS
from lmcache_shared.settings import EXTRA, Settings
from tests.e2e.processes import environment, read_until
from tests.frontend.registries import registry_of as laid

ROOT = Path(__file__).parents[1]
SYSTEMD = ROOT / "deploy" / "systemd"
KUBERNETES = ROOT / "deploy" / "kubernetes"
DOC = ROOT / "docs" / "deploy.md"

Document = dict[str, Any]

VERSIONS = ("1.30", kubernetes_validate.latest_version())
"""1.30 is the oldest that the manifests are for: sidecars, and `sleep` before a stop."""

LMCACHES_OWN: frozenset[str] = frozenset()
"""Settings of LMCache that the files of `deploy/` use and our table does not have."""

VLLM_OPTIONS = {"--host", "--port", "--tensor-parallel-size", "--shutdown-timeout", "--kv-transfer-config"}
"""vLLM's own, as `vllm serve` of 0.32 has them."""

OTHER_VARIABLES = {config.CONFIG_FILE_VARIABLE, "HOME", "PYTHONHASHSEED", "USER"}
MARGIN_SECONDS = 5


class UniqueKeys(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys and says nothing."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key twice, {node.start_mark}"
        return super().construct_mapping(node, deep)


def manifests() -> list[Document]:
    files = sorted(KUBERNETES.glob("*.yaml"))
    return [document for file in files for document in yaml.load_all(file.read_text(), UniqueKeys)]


# --- Kubernetes: what is wrong with a list of documents


def of_kind(documents: Sequence[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document.get("kind") in kinds]


def workloads(documents: Sequence[Document]) -> list[Document]:
    return of_kind(documents, "Deployment", "StatefulSet")


def pod_of(workload: Document) -> Document:
    return workload["spec"]["template"]["spec"]


def labels_of(workload: Document) -> dict[str, str]:
    return workload["spec"]["template"]["metadata"]["labels"]


def containers_of(workload: Document) -> list[Document]:
    return [*pod_of(workload).get("initContainers", []), *pod_of(workload)["containers"]]


def ports_of(workload: Document) -> list[Document]:
    return [port for container in containers_of(workload) for port in container.get("ports", [])]


def has_port(ports: Sequence[Document], wanted: object) -> bool:
    return any(wanted in (port["containerPort"], port.get("name")) for port in ports)


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def problems(documents: Sequence[Document]) -> list[str]:
    """Everything that is wrong, the formats first: what they refuse is not looked at further."""
    wrong = list(formats(documents))
    if not wrong:
        for check in (selectors, ports, volumes, security, programs, configurations, policies, endings):
            try:
                for problem in check(documents):
                    wrong.append(problem)
            except (OpsError, SystemExit) as error:  # options and files that the programs refuse
                wrong.append(f"refused: {error}")
    return wrong


def formats(documents: Sequence[Document]) -> Iterator[str]:
    seen = set()
    for document in documents:
        for version in VERSIONS:
            if problem := refused_by_schema(json.dumps(document), version):
                yield problem
        key = (document.get("kind"), document.get("metadata", {}).get("name"))
        if key in seen:
            yield f"{key} twice"
        seen.add(key)


@functools.cache
def refused_by_schema(text: str, version: str) -> str | None:
    document = json.loads(text)
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return f"Kubernetes {version}: {document.get('kind')}: {error.message}"
    return None


def selectors(documents: Sequence[Document]) -> Iterator[str]:
    for workload in workloads(documents):
        if not matches(workload["spec"]["selector"]["matchLabels"], labels_of(workload)):
            yield f"{workload['kind']}: its selector does not match its pods"
    for service in of_kind(documents, "Service"):
        if not selected(documents, service["spec"]["selector"]):
            yield f"Service {service['metadata']['name']} selects no pod"
    for workload in of_kind(documents, "StatefulSet"):
        service = named(documents, "Service", workload["spec"]["serviceName"])
        if service is None or service["spec"].get("clusterIP") != "None":
            yield f"StatefulSet: serviceName {workload['spec']['serviceName']} is no headless Service"


def selected(documents: Sequence[Document], selector: dict[str, str]) -> list[Document]:
    return [workload for workload in workloads(documents) if matches(selector, labels_of(workload))]


def named(documents: Sequence[Document], kind: str, name: str) -> Document | None:
    return next((found for found in of_kind(documents, kind) if found["metadata"]["name"] == name), None)


def ports(documents: Sequence[Document]) -> Iterator[str]:
    for service in of_kind(documents, "Service"):
        for workload in selected(documents, service["spec"]["selector"]):
            for port in service["spec"]["ports"]:
                if not has_port(ports_of(workload), port["targetPort"]):
                    yield f"Service {service['metadata']['name']}: no container has port {port['targetPort']}"
    for workload in workloads(documents):
        numbers = [port["containerPort"] for port in ports_of(workload)]
        if len(numbers) != len(set(numbers)):
            yield f"two containers of a pod have one port: {numbers}"
        for container in containers_of(workload):
            yield from probes(container)
        yield from scraping(documents, workload)


def probes(container: Document) -> Iterator[str]:
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container.get(kind)
        if probe is None:
            if kind == "livenessProbe":
                yield f"{container['name']}: no {kind}"
        elif not has_port(container["ports"], probe["httpGet"]["port"]):
            yield f"{container['name']}: {kind} asks port {probe['httpGet']['port']}, which it has not"
        elif probe["httpGet"]["path"] != "/health":
            yield f"{container['name']}: {kind} asks {probe['httpGet']['path']}"
    option = "".join(container["args"]).partition("--port")[2].lstrip("=")
    if not has_port(container["ports"], int(re.match(r"\d+", option)[0])):  # type: ignore[index]
        yield f"{container['name']}: --port is not its containerPort"


def scraping(documents: Sequence[Document], workload: Document) -> Iterator[str]:
    annotations = workload["spec"]["template"]["metadata"].get("annotations", {})
    if annotations.get("prometheus.io/scrape") == "true":
        if not has_port(ports_of(workload), int(annotations["prometheus.io/port"])):
            yield f"prometheus.io/port {annotations['prometheus.io/port']}: no container has it"
        path = re.fullmatch("/proxy2/([^/]+)/metrics", annotations["prometheus.io/path"])
        names = {
            node.name for container in containers_of(workload) for node in nodes_of(documents, workload, container)
        }
        if path is None or path[1] not in names:
            yield f"prometheus.io/path {annotations['prometheus.io/path']}: no such node among {sorted(names)}"


def volumes(documents: Sequence[Document]) -> Iterator[str]:
    for workload in workloads(documents):
        there = {volume["name"] for volume in pod_of(workload).get("volumes", [])}
        mounted = {mount["name"] for container in containers_of(workload) for mount in container["volumeMounts"]}
        if there != mounted:
            yield f"volumes {sorted(there)}, but mounts {sorted(mounted)}"
        for volume in pod_of(workload).get("volumes", []):
            name = volume.get("configMap", {}).get("name")
            if name is not None and named(documents, "ConfigMap", name) is None:
                yield f"volume {volume['name']}: no ConfigMap {name}"


def security(documents: Sequence[Document]) -> Iterator[str]:
    """The profile `restricted` of the Pod Security Standards, and a read-only root."""
    for workload in workloads(documents):
        pod = pod_of(workload)
        context = pod.get("securityContext", {})
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            yield "a pod may run as root"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield "a pod has no seccomp profile"
        if pod.get("automountServiceAccountToken") is not False:
            yield "a pod has a token that it does not need"
        if pod.get("enableServiceLinks") is not False:
            yield "enableServiceLinks: a Service may set LMCACHE_CONTROLLER_PORT or VLLM_PORT"
        if any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield "a pod uses the host's namespaces"
        if any(not {"configMap", "emptyDir"} & volume.keys() for volume in pod.get("volumes", [])):
            yield "a volume that is neither configMap nor emptyDir"
        for container in containers_of(workload):
            yield from restricted(container)
            if "lmcache-frontend" in container["command"] and options_of(container).registry.startswith("sqlite"):
                yield f"{container['name']}: --registry is a file on a read-only root"


def restricted(container: Document) -> Iterator[str]:
    wanted = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    if container.get("securityContext") != wanted:
        yield f"{container['name']}: securityContext is not {wanted}"
    if not all(container.get("resources", {}).get(key, {}).get("memory") for key in ("requests", "limits")):
        yield f"{container['name']}: no memory in requests and limits"
    if "replace-me" not in container["image"]:
        yield f"{container['name']}: the image's name does not say that it is a placeholder"


def programs(documents: Sequence[Document]) -> Iterator[str]:
    for workload in workloads(documents):
        for container in containers_of(workload):
            for variable in container.get("env", []):
                if problem := unknown_variable(variable["name"]):
                    yield f"{container['name']}: {problem}"
            match container["command"]:
                case ["lmcache-frontend"]:
                    try:
                        options_of(container)
                    except (OpsError, SystemExit) as error:
                        yield f"{container['name']}: {error}"
                case ["vllm", "serve"]:
                    yield from vllm_line(container["args"])
                case other:
                    yield f"{container['name']}: {other} is no program that is known here"


def unknown_variable(name: str) -> str | None:
    known = {row.env_name for row in SETTINGS.values()} | {ENV_PREFIX + option.upper() for option in OPTIONS}
    return None if name in known | OTHER_VARIABLES else f"nothing reads the variable {name}"


def options_of(container: Document) -> Options:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        return read_options(
            container["args"], {variable["name"]: variable["value"] for variable in variables(container)}
        )


def variables(container: Document) -> list[Document]:
    return container.get("env", [])


def vllm_options(arguments: Sequence[str]) -> dict[str, str]:
    return {option: value for option, _, value in (argument.partition("=") for argument in arguments[1:])}


def vllm_line(arguments: Sequence[str]) -> Iterator[str]:
    options = vllm_options(arguments)
    if unknown := options.keys() - VLLM_OPTIONS:
        yield f"vllm: {sorted(unknown)}"
    yield from connector(options["--kv-transfer-config"])


def connector(text: str) -> Iterator[str]:
    try:
        transfer = json.loads(text)
        module = ROOT / "src" / (transfer["kv_connector_module_path"].replace(".", "/") + ".py")
        classes = {node.name for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.ClassDef)}
        if transfer["kv_connector"] not in classes or transfer["kv_role"] != "kv_both":
            yield f"vllm: {text}: {module.name} has {sorted(classes)}"
    except (ValueError, KeyError, OSError) as error:
        yield f"vllm: --kv-transfer-config {text}: {error!r}"


def mounted_file(documents: Sequence[Document], workload: Document, container: Document, path: str) -> str | None:
    """What a container reads at a path: the text in the ConfigMap that is mounted there."""
    for mount in container["volumeMounts"]:
        if os.path.dirname(path) == mount["mountPath"]:
            for volume in pod_of(workload)["volumes"]:
                if volume["name"] == mount["name"] and "configMap" in volume:
                    found = named(documents, "ConfigMap", volume["configMap"]["name"])
                    return None if found is None else found["data"].get(os.path.basename(path))
    return None


def nodes_of(documents: Sequence[Document], workload: Document, container: Document) -> list[Node]:
    """The nodes that a frontend's container knows; of another container none."""
    return (
        list(registry_of(documents, workload, container).nodes()) if "lmcache-frontend" in container["command"] else []
    )


def registry_of(documents: Sequence[Document], workload: Document, container: Document) -> Registry:
    options = options_of(container)
    assert options.config is not None
    text = mounted_file(documents, workload, container, options.config) or ""
    return laid(read_list(text.encode(), "nodes.json"))


def configurations(documents: Sequence[Document]) -> Iterator[str]:
    try:
        yield from engines_and_nodes(documents)
    except OpsError as error:
        yield str(error)


def engines_and_nodes(documents: Sequence[Document]) -> Iterator[str]:
    for workload in workloads(documents):
        engines = [container for container in containers_of(workload) if container["command"][0] == "vllm"]
        frontends = [container for container in containers_of(workload) if container not in engines]
        for frontend in frontends:
            registry = registry_of(documents, workload, frontend)
            if not engines:
                yield from proxies(documents, registry)
            for engine in engines:
                yield from one_pod(documents, workload, engine, frontend)


def placed_nodes(documents: Sequence[Document], workload: Document, engine: Document) -> list[tuple[str, str]]:
    """The names and addresses of an engine's internal API servers."""
    settings = settings_of(documents, workload, engine)
    workers = int(vllm_options(engine["args"])["--tensor-parallel-size"])
    return [(place(settings, index).name, str(place(settings, index).address)) for index in range(1 + workers)]


def settings_of(documents: Sequence[Document], workload: Document, engine: Document) -> Settings:
    environ = {variable["name"]: variable["value"] for variable in variables(engine)}
    text = mounted_file(documents, workload, engine, environ.pop(config.CONFIG_FILE_VARIABLE))
    if text is None:
        raise OpsError("LMCACHE_CONFIG_FILE: the ConfigMap has no such file")
    return read_settings(text, environ)


def read_settings(text: str, environ: dict[str, str] | None = None) -> Settings:
    overrides = [f"{key}={json.dumps(value)}" for key, value in yaml.load(text, UniqueKeys).items()]
    settings = config.load(environ=environ or {}, overrides=overrides)
    unknown = settings.unknown.keys() - LMCACHES_OWN
    section = {
        key for key in settings.extra_config or {} if SETTINGS.get(key) is None or SETTINGS[key].section != EXTRA
    }
    if unknown or section:
        raise OpsError(f"lmcache.yaml: nothing reads {sorted(unknown | section)}")
    return settings


def one_pod(documents: Sequence[Document], workload: Document, engine: Document, frontend: Document) -> Iterator[str]:
    settings = settings_of(documents, workload, engine)
    if not settings.internal_api_server_enabled:
        yield "internal_api_server_enabled is false"
    prefix = str(settings.internal_api_server_socket_path_prefix)
    folder = os.path.dirname(prefix)
    mounts = [
        {mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == folder}
        for container in (engine, frontend)
    ]
    volume = next((volume for volume in pod_of(workload)["volumes"] if {volume["name"]} == mounts[0]), {})
    if mounts[0] != mounts[1] or "emptyDir" not in volume:
        yield f"{folder} is not one emptyDir of both containers: {mounts}"
    if not all(prefix.startswith(folder + "/") for prefix in options_of(frontend).socket_prefix or [""]):
        yield f"--socket-prefix is not {folder}/"
    if settings.internal_api_server_socket_mode != 0o660 or not pod_of(workload)["securityContext"].get("fsGroup"):
        yield "the sockets are not their group's, or the pod has no fsGroup"
    registered = [(node.name, str(node.address)) for node in nodes_of(documents, workload, frontend)]
    if registered != placed_nodes(documents, workload, engine):
        yield f"nodes.json has {registered}, vLLM {placed_nodes(documents, workload, engine)}"


def proxies(documents: Sequence[Document], registry: Registry) -> Iterator[str]:
    """The cluster's frontend knows every pod by its own name, with the addresses of its nodes."""
    wanted = {}
    for workload in of_kind(documents, "StatefulSet"):
        name, spec = workload["metadata"]["name"], workload["spec"]
        engine = next(container for container in containers_of(workload) if container["command"][0] == "vllm")
        addresses = [address for _, address in placed_nodes(documents, workload, engine)]
        for number in range(spec["replicas"]):
            wanted[f"{name}-{number}.{spec['serviceName']}"] = addresses
    found = {proxy.host: [str(node.address) for node in proxy.nodes] for proxy in registry.proxies()}
    if found != wanted:
        yield f"the cluster's nodes.json has {found}, the pods are {wanted}"
    names = [node.name for node in registry.nodes()]
    if len(names) != len(set(names)):
        yield f"two nodes of one name, so /proxy2 reaches one of them: {names}"
    for proxy in registry.proxies():
        for workload in of_kind(documents, "StatefulSet"):
            sidecars = [c for c in containers_of(workload) if "lmcache-frontend" in c["command"]]
            if [options_of(sidecar).port for sidecar in sidecars] != [proxy.port]:
                yield f"{proxy.name}: no sidecar serves on port {proxy.port}"


def policies(documents: Sequence[Document]) -> Iterator[str]:
    for workload in workloads(documents):
        ours = [rule for rule in of_kind(documents, "NetworkPolicy") if selects(rule, labels_of(workload))]
        if {kind for rule in ours for kind in rule["spec"]["policyTypes"]} != {"Ingress", "Egress"}:
            yield f"{workload['metadata']['name']}: its traffic is not limited"
        for rule in ours:
            for entry in rule["spec"].get("ingress", []):
                if not entry.get("from"):
                    yield "a NetworkPolicy lets everybody in"
                for port in entry["ports"]:
                    if not has_port(ports_of(workload), port["port"]):
                        yield f"NetworkPolicy: no container has port {port['port']}"
    yield from traffic(documents)


def traffic(documents: Sequence[Document]) -> Iterator[str]:
    engine, frontend = {"app.kubernetes.io/name": "lmcache-vllm"}, {"app.kubernetes.io/name": "lmcache-frontend"}
    client, stranger = {"lmcache-ops/completions": "true"}, {"app": "stranger"}
    for source, target, port, wanted in (
        (frontend, engine, 8080, True),
        (frontend, engine, 8000, False),
        (engine, frontend, 8080, False),
        (client, engine, 8000, True),
        (client, engine, 8080, False),
        (client, frontend, 8080, False),
        (stranger, engine, 8000, False),
        (stranger, frontend, 8080, False),
    ):
        if may_talk(documents, source, target, port) != wanted:
            yield f"NetworkPolicy: {source} to {target} port {port} should be {'let through' if wanted else 'stopped'}"
    for labels in (engine, frontend):
        outward = [
            entry
            for rule in of_kind(documents, "NetworkPolicy")
            if selects(rule, labels)
            for entry in rule["spec"]["egress"]
        ]
        if not any({"protocol": "UDP", "port": 53} in entry["ports"] for entry in outward):
            yield f"NetworkPolicy: {labels} may not ask for names"


def selects(rule: Document, labels: dict[str, str]) -> bool:
    return matches(rule["spec"]["podSelector"].get("matchLabels", {}), labels)


def may_talk(documents: Sequence[Document], source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Whether the policies let one pod of the namespace connect to another."""

    def lets(pod: dict[str, str], other: dict[str, str], direction: str, peers: str) -> bool:
        rules = [
            rule
            for rule in of_kind(documents, "NetworkPolicy")
            if selects(rule, pod) and direction.capitalize() in rule["spec"]["policyTypes"]
        ]
        return not rules or any(
            any(entry_port["port"] == port for entry_port in entry["ports"])
            and (peers not in entry or any(is_peer(peer, other) for peer in entry[peers]))
            for rule in rules
            for entry in rule["spec"].get(direction, [])
        )

    return lets(source, target, "egress", "to") and lets(target, source, "ingress", "from")


def is_peer(peer: Document, labels: dict[str, str]) -> bool:
    return "namespaceSelector" not in peer and matches(peer["podSelector"].get("matchLabels", {}), labels)


def endings(documents: Sequence[Document]) -> Iterator[str]:
    for workload in workloads(documents):
        needed = DRAIN_SECONDS + MARGIN_SECONDS
        for container in containers_of(workload):
            needed += container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            if container["command"][0] == "vllm":
                needed += int(vllm_options(container["args"])["--shutdown-timeout"])
                needed += settings_of(documents, workload, container).internal_api_server_drain_seconds
        if pod_of(workload).get("terminationGracePeriodSeconds", 0) < needed:
            yield f"{workload['metadata']['name']}: killed before it has ended: it may take {needed:g} seconds"


# --- Kubernetes: the tests


def test_the_manifests_are_valid() -> None:
    documents = manifests()
    assert {document["kind"] for document in documents} == {
        "ConfigMap", "Deployment", "NetworkPolicy", "Service", "StatefulSet",
    }  # fmt: skip
    assert problems(documents) == []


def config_map(documents: list[Document], name: str, key: str, old: str, new: str) -> None:
    data = named(documents, "ConfigMap", name)["data"]  # type: ignore[index]
    assert old in data[key]
    data[key] = data[key].replace(old, new)


def engine(documents: list[Document]) -> Document:
    return pod_of(workloads_by_name(documents)["lmcache-vllm"])["containers"][0]


def sidecar(documents: list[Document]) -> Document:
    return pod_of(workloads_by_name(documents)["lmcache-vllm"])["initContainers"][0]


def workloads_by_name(documents: list[Document]) -> dict[str, Document]:
    return {workload["metadata"]["name"]: workload for workload in workloads(documents)}


def vllm_pod(documents: list[Document]) -> Document:
    return pod_of(workloads_by_name(documents)["lmcache-vllm"])


def kind(documents: list[Document], kind: str, number: int = 0) -> Document:
    return of_kind(documents, kind)[number]


BREAKS: dict[str, tuple[Callable[[list[Document]], object], str]] = {
    "unknown field": (lambda d: engine(d).update(imagePullPolice="Always"), "imagePullPolice"),
    "wrong type": (lambda d: kind(d, "Deployment")["spec"].update(replicas="two"), "two"),
    "unknown version": (lambda d: kind(d, "Deployment").update(apiVersion="apps/v1beta9"), "schema"),
    "field that is missing": (lambda d: kind(d, "StatefulSet")["spec"].pop("selector"), "selector"),
    "name twice": (lambda d: d.append(copy.deepcopy(d[0])), "twice"),
    "pods without the label": (
        lambda d: labels_of(kind(d, "Deployment")).update({"app.kubernetes.io/name": "x"}), "its selector"),
    "service of nothing": (lambda d: kind(d, "Service")["spec"].update(selector={"a": "b"}), "selects no pod"),
    "no headless service": (lambda d: kind(d, "StatefulSet")["spec"].update(serviceName="x"), "headless"),
    "service's port": (lambda d: kind(d, "Service")["spec"]["ports"][0].update(targetPort="x"), "no container has"),
    "probe's port": (lambda d: engine(d)["startupProbe"]["httpGet"].update(port="dashboard"), "startupProbe"),
    "probe's path": (lambda d: engine(d)["startupProbe"]["httpGet"].update(path="/healthz"), "startupProbe"),
    "no liveness": (lambda d: sidecar(d).pop("livenessProbe"), "livenessProbe"),
    "vLLM's port": (lambda d: sidecar(d)["ports"][0].update(containerPort=8000), "one port"),
    "option port": (lambda d: sidecar(d)["args"].__setitem__(1, "8000"), "--port"),
    "scraped node": (lambda d: kind(d, "StatefulSet")["spec"]["template"]["metadata"]["annotations"].update(
        {"prometheus.io/path": "/proxy2/x/metrics"}), "prometheus.io/path"),
    "scraped port": (lambda d: kind(d, "StatefulSet")["spec"]["template"]["metadata"]["annotations"].update(
        {"prometheus.io/port": "9090"}), "prometheus.io/port"),
    "mount of nothing": (lambda d: sidecar(d)["volumeMounts"][1].update(name="x"), "volumes"),
    "config map of nothing": (lambda d: vllm_pod(d)["volumes"][0]["configMap"].update(name="x"), "no ConfigMap"),
    "root": (lambda d: vllm_pod(d)["securityContext"].pop("runAsNonRoot"), "root"),
    "seccomp": (lambda d: vllm_pod(d)["securityContext"].pop("seccompProfile"), "seccomp"),
    "token": (lambda d: vllm_pod(d).pop("automountServiceAccountToken"), "token"),
    "service links": (lambda d: vllm_pod(d).pop("enableServiceLinks"), "enableServiceLinks"),
    "host network": (lambda d: vllm_pod(d).update(hostNetwork=True), "host's"),
    "host path": (lambda d: vllm_pod(d)["volumes"].__setitem__(1, {"name": "sockets", "hostPath": {"path": "/run"}}),
                  "neither"),
    "writable root": (lambda d: engine(d)["securityContext"].pop("readOnlyRootFilesystem"), "readOnlyRootFilesystem"),
    "no limit": (lambda d: sidecar(d)["resources"].pop("limits"), "memory"),
    "real image": (lambda d: engine(d).update(image="vllm"), "placeholder"),
    "registry on a read-only root": (lambda d: sidecar(d)["args"].__setitem__(7, "sqlite"), "read-only root"),
    "unknown option": (lambda d: sidecar(d)["args"].__setitem__(4, "--socket-prefixx"), "frontend: 2"),
    "wrong option": (lambda d: sidecar(d)["args"].__setitem__(5, "run/lmcache"), "starts with /"),
    "unknown variable": (lambda d: engine(d)["env"][1].update(name="LMCACHE_CHUNKSIZE"), "LMCACHE_CHUNKSIZE"),
    "unknown program": (lambda d: sidecar(d).update(command=["lmcache_frontend"]), "no program"),
    "vLLM's option": (lambda d: engine(d)["args"].append("--shutdown-timeouts=3"), "--shutdown-timeouts"),
    "connector": (lambda d: engine(d)["args"].__setitem__(5, engine(d)["args"][5].replace("vllm_c", "c")), "vllm:"),
    "setting's name": (lambda d: config_map(d, "lmcache-vllm", "lmcache.yaml", "chunk_size", "chunks"), "chunks"),
    "setting's name in the section": (
        lambda d: config_map(d, "lmcache-vllm", "lmcache.yaml", "socket_mode", "socket_mod"), "socket_mod"),
    "setting's value": (lambda d: config_map(d, "lmcache-vllm", "lmcache.yaml", "256", "some"), "chunk_size"),
    "socket's mode": (lambda d: config_map(d, "lmcache-vllm", "lmcache.yaml", "0660", "0600"), "group"),
    "no group": (lambda d: vllm_pod(d)["securityContext"].pop("fsGroup"), "fsGroup"),
    "socket's folder": (lambda d: config_map(d, "lmcache-vllm", "lmcache.yaml", "/run/lm", "/run/x"), "emptyDir"),
    "socket's prefix": (lambda d: sidecar(d)["args"].__setitem__(5, "/tmp/"), "--socket-prefix"),
    "config file": (lambda d: engine(d)["env"][0].update(value="/etc/lmcache/x.yaml"), "no such file"),
    "no list of nodes": (lambda d: config_map(d, "lmcache-vllm", "nodes.json", "]", ""), "JSON"),
    "node's socket": (lambda d: config_map(d, "lmcache-vllm", "nodes.json", "7000", "7001"), "nodes.json"),
    "more workers": (lambda d: engine(d)["args"].__setitem__(3, "--tensor-parallel-size=2"), "nodes.json"),
    "more pods": (lambda d: kind(d, "StatefulSet")["spec"].update(replicas=3), "the cluster's nodes.json"),
    "pod's name": (lambda d: config_map(d, "lmcache-frontend", "nodes.json", "1.lmcache", "1.x"), "the cluster's"),
    "pod's port": (lambda d: config_map(d, "lmcache-frontend", "nodes.json", "8080", "8081"), "no sidecar"),
    "nodes of one name": (lambda d: config_map(d, "lmcache-frontend", "nodes.json", "vllm-1_", "vllm-0_"), "one name"),
    "no policy": (lambda d: d.remove(kind(d, "NetworkPolicy", 1)), "not limited"),
    "open policy": (lambda d: kind(d, "NetworkPolicy")["spec"]["ingress"][0].pop("from"), "everybody"),
    "policy's port": (lambda d: kind(d, "NetworkPolicy")["spec"]["ingress"][0]["ports"][0].update(port=80), "port 80"),
    "policy's peer": (lambda d: kind(d, "NetworkPolicy", 0)["spec"]["ingress"][1]["from"].pop(0), "let through"),
    "wide peer": (
        lambda d: kind(d, "NetworkPolicy")["spec"]["ingress"][1]["from"][0].update(podSelector={}), "stopped"),
    "no names": (lambda d: kind(d, "NetworkPolicy", 1)["spec"]["egress"].pop(0), "names"),
    "short grace": (lambda d: vllm_pod(d).update(terminationGracePeriodSeconds=30), "killed before"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_manifest_is_found(broken: str) -> None:
    documents = manifests()
    change, told = BREAKS[broken]
    change(documents)
    assert any(told in problem for problem in problems(documents)), problems(documents)


def test_two_equal_keys_are_found() -> None:
    with pytest.raises(AssertionError, match="a key twice"):
        yaml.load("a: 1\na: 2", UniqueKeys)


# --- systemd

UNITS = ("lmcache-frontend.service", "lmcache-api@.service")

DIRECTIVES = {
    "Unit": {"Description", "Wants", "After"},
    "Service": {
        "AmbientCapabilities", "CapabilityBoundingSet", "EnvironmentFile", "ExecStart", "Group", "LimitNOFILE",
        "LockPersonality", "MemoryDenyWriteExecute", "MemoryMax", "NoNewPrivileges", "PrivateDevices", "PrivateTmp",
        "ProtectClock", "ProtectControlGroups", "ProtectHome", "ProtectHostname", "ProtectKernelLogs",
        "ProtectKernelModules", "ProtectKernelTunables", "ProtectProc", "ProtectSystem", "RemoveIPC", "Restart",
        "RestartPreventExitStatus", "RestartSec", "RestrictAddressFamilies", "RestrictNamespaces", "RestrictRealtime",
        "RestrictSUIDSGID", "RuntimeDirectory", "RuntimeDirectoryMode", "RuntimeDirectoryPreserve", "StateDirectory",
        "StateDirectoryMode", "SystemCallArchitectures", "SystemCallErrorNumber", "SystemCallFilter", "TasksMax",
        "TimeoutStopSec", "Type", "UMask", "User",
    },
    "Install": {"WantedBy", "DefaultInstance"},
}  # fmt: skip
"""Of systemd.unit(5), systemd.service(5), systemd.exec(5) and systemd.resource-control(5)."""

HARDENED = {
    "CapabilityBoundingSet": "", "LockPersonality": "yes", "NoNewPrivileges": "yes", "PrivateTmp": "yes",
    "ProtectHome": "yes", "ProtectKernelModules": "yes", "ProtectSystem": "strict", "Restart": "on-failure",
    "RestartPreventExitStatus": "2", "RestrictNamespaces": "yes", "RestrictSUIDSGID": "yes",
    "RuntimeDirectory": "lmcache", "RuntimeDirectoryMode": "2770", "RuntimeDirectoryPreserve": "yes",
    "SystemCallFilter": "@system-service", "User": "lmcache",
}  # fmt: skip

INSTANCES = sorted(path.stem.removeprefix("api-") for path in (SYSTEMD / "etc").glob("api-*.env"))
PROGRAMS = {
    "/opt/lmcache-ops/bin/lmcache-api": "lmcache_api",
    "/opt/lmcache-ops/bin/lmcache-frontend": "lmcache_frontend",
}


def unit(text: str) -> dict[str, dict[str, str]]:
    """A unit's sections; what is no section, no setting and no comment is an error, so is a directive twice."""
    sections: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for line in text.splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            current = sections.setdefault(header[1], {})
        elif line and line[0] not in "#;":
            key, equals, value = line.partition("=")
            assert equals and key == key.strip() and not value.endswith("\\"), line
            assert key not in current, f"{key} twice"
            current[key] = value.strip()
    return sections


def env_file(name: str) -> dict[str, str]:
    lines = [line for line in (SYSTEMD / "etc" / name).read_text().splitlines() if line and line[0] != "#"]
    return dict(line.split("=", 1) for line in lines)


def exec_line(service: dict[str, str], instance: str = "") -> tuple[list[str], dict[str, str]]:
    """The command that systemd makes of ExecStart, and the environment that it adds."""
    path = service["EnvironmentFile"].removeprefix("-").replace("%i", instance)
    assert os.path.dirname(path) == "/etc/lmcache-ops"
    environ = env_file(os.path.basename(path))
    words = [word for word in shlex.split(service["ExecStart"]) for word in expanded(word, environ)]
    return [word.replace("%i", instance) for word in words], environ


def expanded(word: str, environ: dict[str, str]) -> list[str]:
    """`$NAME` as a word of its own becomes the words in the variable."""
    return environ[word[1:]].split() if word.startswith("$") else [word]


def unit_problems(name: str, text: str) -> list[str]:
    sections = unit(text)
    wrong = [f"unknown section {section}" for section in sections.keys() - DIRECTIVES.keys()]
    wrong += [
        f"unknown directive {key}"
        for section in sections.keys() & DIRECTIVES.keys()
        for key in sections[section].keys() - DIRECTIVES[section]
    ]
    service = sections["Service"]
    wrong += [f"{key} is not {value!r}" for key, value in HARDENED.items() if service.get(key) != value]
    drain = DRAIN_SECONDS
    for instance in INSTANCES if "@" in name else [""]:
        try:
            command, environ = exec_line(service, instance)
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                if PROGRAMS[command[0]] == "lmcache_frontend":
                    wrong += [problem for variable in environ if (problem := unknown_variable(variable))]
                    read_options(command[1:], environ)
                else:
                    assert list(environ) == ["API_OPTIONS"]
                    api_parser().parse_args(command[1:])
                    settings = read_settings((SYSTEMD / "etc" / "lmcache.yaml").read_text())
                    drain = settings.internal_api_server_drain_seconds
        except (OpsError, SystemExit, KeyError) as error:
            wrong.append(f"ExecStart: {instance}: {error!r}")
    if not drain + MARGIN_SECONDS <= int(service["TimeoutStopSec"]) <= 90:
        wrong.append(f"TimeoutStopSec: it may take {drain:g} seconds")
    return wrong


@pytest.mark.parametrize("name", UNITS)
def test_units(name: str) -> None:
    assert unit_problems(name, (SYSTEMD / name).read_text()) == []


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("ProtectSystem=strict", "ProtectSystems=strict", "ProtectSystems"),
        ("[Install]", "[Instal]", "Instal"),
        ("--config", "--configuration", "ExecStart"),
        ("/bin/lmcache-", "/bin/lmc-", "ExecStart"),
        ("NoNewPrivileges=yes\n", "", "NoNewPrivileges"),
        ("RestartSec=2", "RestartSec=2", "TimeoutStopSec"),
    ],
)
def test_a_broken_unit_is_found(name: str, old: str, new: str, told: str) -> None:
    text = (SYSTEMD / name).read_text()
    assert old in text
    if told == "TimeoutStopSec":
        text = re.sub("TimeoutStopSec=.*", "TimeoutStopSec=1", text)
    wrong = unit_problems(name, text.replace(old, new))
    assert any(told in problem for problem in wrong), wrong


def verified_by_systemd(folder: Path, change: Callable[[str], str] = str) -> str | None:
    """What `systemd-analyze verify` says of the units; nothing where there is none, or it cannot run."""
    program = shutil.which("systemd-analyze")
    if program is None:
        return None
    for path, module in PROGRAMS.items():
        target = folder / os.path.basename(path)
        target.write_text(f"#!/bin/sh\nexec {sys.executable} -m {module}\n")
        target.chmod(0o755)
    for name in UNITS:
        text = change((SYSTEMD / name).read_text()).replace("/opt/lmcache-ops/bin", str(folder))
        (folder / name.replace("@", "@all")).write_text(text)
    units = [str(folder / name.replace("@", "@all")) for name in UNITS]
    done = subprocess.run([program, "verify", "--man=no", *units], capture_output=True, text=True, timeout=60)
    about_ours = [line for line in done.stderr.splitlines() if str(folder) in line or "lmcache-" in line]
    return "\n".join(about_ours)


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for name in UNITS:
        assert unit((SYSTEMD / name).read_text()).keys() == DIRECTIVES.keys()
    said = verified_by_systemd(tmp_path)
    assert not said
    if said is not None:  # it looks at what it is shown
        broken = verified_by_systemd(tmp_path, lambda text: text.replace("ProtectSystem=", "ProtectSystems="))
        assert "ProtectSystems" in (broken or "")


def test_the_files_of_etc_fit_together() -> None:
    settings = read_settings((SYSTEMD / "etc" / "lmcache.yaml").read_text())
    file = SYSTEMD / "etc" / "nodes.json"
    nodes = [node for node in read_list(file.read_bytes(), str(file)) if isinstance(node, Node)]
    placed = [place(settings, index) for index in (0, 1, CONTROLLER_INDEX)]
    assert [(node.name, node.address) for node in nodes] == [(each.name, each.address) for each in placed]
    service = unit((SYSTEMD / UNITS[0]).read_text())["Service"]
    folder = f"/run/{service['RuntimeDirectory']}/"
    assert str(settings.internal_api_server_socket_path_prefix).startswith(folder)
    assert read_options(exec_line(service)[0][1:], {}).socket_prefix == [folder]
    assert settings.internal_api_server_socket_mode == 0o660
    command, environ = exec_line(service)
    options = read_options(command[1:], environ)
    assert options.registry.startswith(f"sqlite:/var/lib/{service['StateDirectory']}/")
    assert INSTANCES == ["all", "controller", "scheduler", "worker0"]


def test_the_user_of_the_units_is_made() -> None:
    lines = (SYSTEMD / "lmcache-ops.sysusers.conf").read_text().splitlines()
    made = [line.split()[1] for line in lines if line.startswith("u ")]
    assert made == ["lmcache"]


# --- what the files start, started


@contextlib.contextmanager
def started(command: Sequence[str], told: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """A program as the file has it; it ends by SIGTERM, with 0 and in time."""
    child = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment(**environ), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, umask=0o077,
    )  # fmt: skip
    try:
        read_until(child, told)
        yield child
        child.send_signal(signal.SIGTERM)
        assert child.wait(DRAIN_SECONDS + MARGIN_SECONDS) == 0
    finally:
        child.kill()
        child.communicate()


def ask(port: int, path: str, body: bytes | None = None) -> bytes:
    deadline = time.monotonic() + 10
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", body, timeout=10) as response:
                return response.read()
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_the_units_lines_run(tmp_path: Path) -> None:
    shutil.copytree(SYSTEMD / "etc", tmp_path / "etc")
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o2770)
    for file in (tmp_path / "etc").iterdir():
        file.write_text(file.read_text().replace("/run/lmcache", str(tmp_path / "run")))
    port = free_port()

    def here(words: Sequence[str]) -> list[str]:
        words = [PROGRAMS[words[0]], *words[1:]]
        return [
            word.replace("/etc/lmcache-ops", str(tmp_path / "etc")).replace("/run/lmcache", str(tmp_path / "run"))
            for word in words
        ]

    service = unit((SYSTEMD / "lmcache-api@.service").read_text())["Service"]
    frontend, environ = exec_line(unit((SYSTEMD / "lmcache-frontend.service").read_text())["Service"])
    environ["LMCACHE_FRONTEND_PORT"] = str(port)
    environ["LMCACHE_FRONTEND_REGISTRY"] = environ["LMCACHE_FRONTEND_REGISTRY"].replace("/var/lib", str(tmp_path))
    with contextlib.ExitStack() as stack:
        for instance in ("scheduler", "worker0"):
            stack.enter_context(started(here(exec_line(service, instance)[0]), "serves on"))
        stack.enter_context(started(here(frontend), "frontend serves on http://127.0.0.1", **environ))
        sockets = sorted((tmp_path / "run").glob("socket_*"))
        assert [path.name for path in sockets] == ["socket_6999", "socket_7000"]
        for path in sockets:
            assert path.stat().st_mode & 0o777 == 0o660
        assert b"healthy" in ask(port, "/health")
        added = {"name": "added", "host": "10.0.0.1", "port": 7000}
        assert b"success" in ask(port, "/api/proxies/local_proxy/nodes", json.dumps(added).encode())
        assert (tmp_path / "lmcache-ops" / "frontend.db").exists()
        for name in ("lmcache_scheduler", "lmcache_worker0"):
            assert b"lmcache:" in ask(port, f"/proxy2/{name}/metrics")
        assert b'"num_hit_tokens":0' in ask(port, "/proxy2/lmcache_scheduler/cache/lookup?tokens_mock=0,256").replace(
            b" ", b""
        )
    assert list((tmp_path / "run").glob("socket_*")) == []

    with contextlib.ExitStack() as stack:  # or all in one process, and the controller beside it
        for instance in ("controller", "all"):
            stack.enter_context(started(here(exec_line(service, instance)[0]), "serves on"))
        stack.enter_context(started(here(frontend), "frontend serves on http://127.0.0.1", **environ))
        deadline = time.monotonic() + 20
        while b'"worker_id":0' not in (told := ask(port, "/proxy2/lmcache_controller/controller/workers")):
            assert time.monotonic() < deadline, told
            time.sleep(0.1)
    assert list((tmp_path / "run").glob("socket_*")) == []


def test_the_pods_arrangement_runs(tmp_path: Path) -> None:
    """The sidecar and the cluster's frontend as the manifests start them; our own engine takes vLLM's place."""
    documents = manifests()
    pods = workloads_by_name(documents)
    sidecar_port, cluster_port = free_port(), free_port()
    (tmp_path / "run").mkdir()

    def mounted(workload: str, container: Document, port: int) -> list[str]:
        folder = tmp_path / workload
        folder.mkdir(exist_ok=True)
        for key, text in named(documents, "ConfigMap", workload)["data"].items():  # type: ignore[index]
            here = text.replace('"lmcache-vllm-0.lmcache-vllm", "port": 8080', f'"127.0.0.1", "port": {sidecar_port}')
            if workload == "lmcache-vllm" or key != "nodes.json":
                here = here.replace("/run/lmcache", str(tmp_path / "run"))
            else:
                here = here.replace("/run/lmcache", str(tmp_path / "run")).replace(
                    "lmcache-vllm-1.lmcache-vllm", "127.0.0.2"
                )
            (folder / key).write_text(here)
        words = [
            word.replace("/etc/lmcache", str(folder)).replace("/run/lmcache", str(tmp_path / "run"))
            for word in container["args"]
        ]
        return [str(port) if before == "--port" else word for before, word in zip(["", *words], words, strict=False)]

    cluster = pod_of(pods["lmcache-frontend"])["containers"][0]
    sidecar_line = mounted("lmcache-vllm", sidecar(documents), sidecar_port)
    cluster_line = mounted("lmcache-frontend", cluster, cluster_port)
    path = pods["lmcache-vllm"]["spec"]["template"]["metadata"]["annotations"]["prometheus.io/path"]
    with contextlib.ExitStack() as stack:
        # the sidecar is there first, and the cluster's frontend before the engine
        stack.enter_context(started(["lmcache_frontend", *sidecar_line], "(2 nodes)"))
        stack.enter_context(started(["lmcache_frontend", *cluster_line], "(4 nodes)"))
        for port in (sidecar_port, cluster_port):
            assert b"healthy" in ask(port, sidecar(documents)["livenessProbe"]["httpGet"]["path"])
        settings = str(tmp_path / "lmcache-vllm" / "lmcache.yaml")
        stack.enter_context(started(["lmcache_api"], "worker0", LMCACHE_CONFIG_FILE=settings))
        assert b"lmcache:" in ask(sidecar_port, path)
        for name in ("vllm-0_scheduler", "vllm-0_worker0"):
            assert b"lmcache:" in ask(cluster_port, f"/proxy2/{name}/metrics")
        told = json.loads(ask(cluster_port, "/api/nodes"))["nodes"]
        assert [proxy["name"] for proxy in told] == ["lmcache-vllm-0", "lmcache-vllm-1"]
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(
                f"http://127.0.0.1:{cluster_port}/proxy/localhost/%2Frun%2Fdocker.sock/info", timeout=10
            )
        assert refused.value.code == 403
        refused.value.close()


# --- the page


def test_the_page_tells_of_every_file_and_names_none_that_is_not_there() -> None:
    text = DOC.read_text()
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "deploy").rglob("*") if path.is_file()}
    named_files = set(re.findall(r"deploy/[\w./@-]+\w", text))
    assert {name for name in named_files if not (ROOT / name).exists()} == set()
    assert [name for name in files if os.path.basename(name) not in text] == []


def test_the_pages_commands_have_options_that_exist() -> None:
    text = DOC.read_text()
    blocks = "\n".join(re.findall(r"```(?:sh|ini|yaml)\n(.*?)```", text, re.DOTALL))
    lines = re.sub(r"\\\n\s*", " ", blocks).splitlines()
    known = {flag_of(option) for option in OPTIONS} | {"--print-plugin-path", "--version"}
    ours = {flag for action in api_parser()._actions for flag in action.option_strings}
    looked_at = 0
    for line in lines:
        for program, flags in (("lmcache-frontend ", known), ("lmcache-api ", ours)):
            if f"bin/{program}" in line or line.startswith(program):
                looked_at += 1
                assert set(re.findall(r"(?<!\S)--[a-z-]+", line.partition(program)[2])) <= flags, line
    assert looked_at >= 3
    for transfer in re.findall(r"--kv-transfer-config '(\{.*?\})'", text, re.DOTALL):
        assert list(connector(transfer)) == []
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        assert yaml.load(block, UniqueKeys)
