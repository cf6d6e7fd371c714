"""A Kubernetes sketch of a deployment: for each pool a service and what runs its instances under vLLM.

An instance on one node is a pod of a StatefulSet, one on several nodes a group of a LeaderWorkerSet. It is a sketch:
the node label, the image, the volume with the checkpoint and the secret's name are the cluster's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from hetkv.planner.output.launch import HOST, RPC_PORT, SECRET, Server, servers
from hetkv.simulator.deployment import Plan

RESOURCES = {
    "nvidia": "nvidia.com/gpu",
    "amd": "amd.com/gpu",
    "intel": "gpu.intel.com/i915",
    "huawei": "huawei.com/Ascend910",
}
IMAGES = {"nvidia": "vllm/vllm-openai:latest", "amd": "rocm/vllm:latest"}
NODE_LABEL = "hetkv/gpu"
HEAD = """\
# A sketch, to be finished with the cluster's own names:
# - nodes carry the label {label} with the GPU's name, set by you;
# - the images hold vLLM and hetkv: a line `RUN pip install hetkv` over {images};
# - the claim `models` holds the checkpoint under /models/{model};
# - the secret `hetkv` holds the shared secret of the KV links (16 bytes or more) as `hetkv.secret`.
"""


def resource(server: Server) -> str:
    """The name under which the vendor's device plugin offers the GPU."""
    if server.gpu.startswith("Gaudi"):
        return "habana.ai/gaudi"
    return RESOURCES.get(server.vendor, f"{server.vendor}.com/gpu")


def manifests(plan: Plan, gpus_per_node: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """The documents, as plain dictionaries: a Service and a workload for each pool."""
    found = []
    for server in servers(plan, "vllm", gpus_per_node):
        found += [_service(server), _several(server) if server.nodes > 1 else _single(server)]
    return found


def kubernetes_yaml(plan: Plan, gpus_per_node: Mapping[str, int] | None = None) -> str:
    """The manifests as YAML documents under a comment that says what is left to fill in."""
    found = servers(plan, "vllm", gpus_per_node)
    images = " and ".join(dict.fromkeys(_image(server) for server in found))
    model = found[0].arguments[1]
    head = HEAD.format(label=NODE_LABEL, images=images, model=model)
    body = yaml.safe_dump_all(manifests(plan, gpus_per_node), sort_keys=False, width=110)
    return f"{head}---\n{body}"


def _image(server: Server) -> str:
    return IMAGES.get(server.vendor, f"vllm-{server.vendor}:latest")


def _service(server: Server) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": _name(server)},
        # Headless: the router chooses the instance, and KV links go from instance to instance.
        "spec": {
            "clusterIP": "None",
            "selector": {"app": _name(server)},
            "ports": [{"name": "http", "port": server.port}],
        },
    }


def _single(server: Server) -> dict[str, Any]:
    name = _name(server)
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name},
        "spec": {
            "serviceName": name,
            "replicas": server.count,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": {"app": name}},
            "template": _pod(server, _arguments(server)),
        },
    }


def _several(server: Server) -> dict[str, Any]:
    name = _name(server)
    head, local = "$(LWS_LEADER_ADDRESS)", 0
    if server.dp > 1:  # whole replicas on every node
        local = server.dp // server.nodes
        ranks = ["--data-parallel-size-local", str(local), "--data-parallel-address", head]
        ranks += ["--data-parallel-rpc-port", str(RPC_PORT)]
    else:
        ranks = ["--nnodes", "$(LWS_GROUP_SIZE)", "--node-rank", "$(LWS_WORKER_INDEX)", "--master-addr", head]
    worker = _pod(server, [*_arguments(server), *ranks, "--headless"], label=False)
    if local:  # the manifest's own $(...) cannot multiply
        start = f'exec vllm serve "$@" --data-parallel-start-rank $((LWS_WORKER_INDEX * {local}))'
        worker["spec"]["containers"][0]["command"] = ["sh", "-c", start, "vllm"]
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": name},
        "spec": {
            "replicas": server.count,
            "leaderWorkerTemplate": {
                "size": server.nodes,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": _pod(server, [*_arguments(server), *ranks]),
                "workerTemplate": worker,
            },
        },
    }


def _pod(server: Server, arguments: list[str], label: bool = True) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "vllm",
        "image": _image(server),
        "command": ["vllm", "serve"],
        "args": arguments,
        "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "ports": [{"name": "http", "containerPort": server.port}],
        "resources": {"limits": {resource(server): server.per_node}},
        "volumeMounts": [
            {"name": "models", "mountPath": "/models", "readOnly": True},
            {"name": "secret", "mountPath": "/etc/hetkv", "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if label:  # the one that serves
        container["readinessProbe"] = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10}
    return {
        "metadata": {"labels": {"app": _name(server)} if label else {"group": _name(server)}},
        "spec": {
            "nodeSelector": {NODE_LABEL: server.gpu},
            "containers": [container],
            "volumes": [
                {"name": "models", "persistentVolumeClaim": {"claimName": "models"}},
                {"name": "secret", "secret": {"secretName": "hetkv", "defaultMode": 0o600}},
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
            ],
        },
    }


def _arguments(server: Server) -> list[str]:
    model = server.arguments[1]
    given = [a.replace(HOST, "$(POD_IP)").replace(SECRET, f"/etc/hetkv/{SECRET}") for a in server.arguments]
    return [f"/models/{model}", *given, "--host", "0.0.0.0", "--port", str(server.port)]


def _name(server: Server) -> str:
    """A DNS label: names of pools may hold more."""
    return "-".join("".join(c if c.isalnum() else " " for c in f"hetkv {server.pool}".lower()).split())
