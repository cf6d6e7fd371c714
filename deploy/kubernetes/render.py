"""Kubernetes manifests of one model's deployment: `hetkv serve` as the front, and its instances by role.

    python deploy/kubernetes/render.py --image REGISTRY/hetkv:0.1 --model /models/llama --claim models \
        --prefill 2xTP1 --decode 4xTP1 | kubectl apply -f -

Writes YAML to standard output. Every pod reads the shared secret from the Secret `NAME-secret`, which is not made here:

    kubectl create secret generic hetkv-secret --from-file=secret=hetkv.secret
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

import yaml

GATE, HTTP = 7100, 8000
SECRET = "/run/hetkv/secret"


def manifests(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Service, front, and one deployment a role."""
    name = args.name
    front = ["serve", "--model", args.model, "--none", "--host", "0.0.0.0", "--port", str(HTTP),
             "--gate", f"0.0.0.0:{GATE}", "--secret-file", SECRET]  # fmt: skip
    # Not /health, which is 503 until instances have joined, which they do through the service: it needs a ready pod.
    probe = {"httpGet": {"path": "/metrics", "port": HTTP}, "periodSeconds": 5}
    found = [
        _service(name),
        _deployment(args, "front", 1, front, ports=(HTTP, GATE), probe=probe, gpus=0),
    ]
    for role in ("prefill", "decode"):
        count, shape = parse(getattr(args, role))
        join = ["serve", "--model", args.model, "--join", f"{name}-front:{GATE}", f"--{role}", shape,
                "--instance-host", "$(POD_IP)", "--secret-file", SECRET]  # fmt: skip
        found.append(_deployment(args, role, count, join, ports=(), probe=None, gpus=args.gpus))
    return found


def parse(text: str) -> tuple[int, str]:
    """`4xTP2` is (4, "TP2"). Exits with a message for anything else."""
    match = re.fullmatch(r"(?:(\d+)x)?(TP\d+(?:PP\d+)?)", text)
    if match is None or match[1] == "0":
        sys.exit(f"{text!r}: write NxTPa or NxTPaPPb, such as 4xTP2")
    return int(match[1] or 1), match[2]


def _labels(name: str, part: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "hetkv", "app.kubernetes.io/instance": name, "app.kubernetes.io/component": part}


def _service(name: str) -> dict[str, Any]:
    ports = [{"name": "http", "port": HTTP}, {"name": "gate", "port": GATE}]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"{name}-front", "labels": _labels(name, "front")},
        "spec": {"selector": _labels(name, "front"), "ports": ports},
    }


def _deployment(
    args: argparse.Namespace,
    part: str,
    count: int,
    command: list[str],
    *,
    ports: tuple[int, ...],
    probe: dict[str, Any] | None,
    gpus: int,
) -> dict[str, Any]:
    """`terminationGracePeriodSeconds`: SIGTERM lets requests that were accepted end first."""
    labels = _labels(args.name, part)
    container: dict[str, Any] = {
        "name": part,
        "image": args.image,
        "args": command,
        "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "volumeMounts": [
            {"name": "models", "mountPath": args.model, "readOnly": True},
            {"name": "secret", "mountPath": "/run/hetkv", "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if ports:
        container["ports"] = [{"containerPort": port} for port in ports]
    if probe:
        container["readinessProbe"] = probe
    if gpus:
        container["resources"] = {"limits": {args.gpu_resource: gpus}}
    volumes = [
        {"name": "models", "persistentVolumeClaim": {"claimName": args.claim, "readOnly": True}},
        {"name": "secret", "secret": {"secretName": f"{args.name}-secret", "defaultMode": 0o400}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": args.shm}},
    ]
    pod = {"containers": [container], "volumes": volumes, "terminationGracePeriodSeconds": 600}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": f"{args.name}-{part}", "labels": labels},
        "spec": {
            "replicas": count,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="hetkv")
    parser.add_argument("--image", required=True, help="with hetkv[serve] and `hetkv` as its entry point")
    parser.add_argument("--model", required=True, help="directory of the checkpoint in the pods")
    parser.add_argument("--claim", required=True, help="PersistentVolumeClaim that has it")
    parser.add_argument("--prefill", default="TP1", metavar="NxTPa")
    parser.add_argument("--decode", default="TP1", metavar="NxTPa")
    parser.add_argument("--gpus", type=int, default=1, help="of an instance's pod; 0: CPU")
    parser.add_argument("--gpu-resource", default="nvidia.com/gpu", help="or amd.com/gpu")
    parser.add_argument("--shm", default="8Gi", help="room for windows in shared memory")
    args = parser.parse_args(arguments)
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?", args.name):
        parser.error(f"--name {args.name!r}: lower-case letters, digits and hyphens")
    return args


if __name__ == "__main__":
    yaml.safe_dump_all(manifests(options()), sys.stdout, sort_keys=False)
