"""Print what a load needs: cells, hosts, cores, GPUs and network.

    .venv/bin/python benchmarks/sizing.py --images-per-second 20000 --gpu-images-per-second 5000
    .venv/bin/python benchmarks/sizing.py --images-per-second 100 1000 --model-ms 25 --mix jpeg-90kB=1

A cell is one Redis with its own web hosts and model servers. Redis has one thread, so its CPU for each image decides
how many cells there are, unless its network is full first. The costs of an image are in benchmarks/costs.json, which
benchmarks/sizing_points.py --write measures. On another machine they may be twice as high, so measure them there.
Cores, GPUs and network are planned at --use of what they can do, so that the load may vary and a host may fail.
"""

import argparse
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

COSTS = Path(__file__).with_name("costs.json")
MIX = "jpeg-90kB=0.8,png-432kB=0.2"


@dataclass(frozen=True)
class Costs:
    """What an image costs: ms of CPU by program, and bytes. The web's depend on the picture, the others' do not."""

    web_ms: dict[str, float]  # by picture; Apache and its web processes together
    file_bytes: dict[str, float]  # by picture
    redis_ms: float
    model_server_ms: float  # to take it, unpack it and answer it, without the model
    batch_ms: float  # of a model server for a batch, however many images it has
    job_bytes: float  # what the web sends to Redis, and Redis to the model server

    def taking_ms(self, batch: float) -> float:
        """Return the CPU of a model server for an image, when `batch` images are in a batch on average."""
        return self.model_server_ms + self.batch_ms / batch

    @classmethod
    def load(cls, path: Path = COSTS) -> "Costs":
        """Read them from a JSON file."""
        values: dict[str, Any] = json.loads(path.read_text())
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Hosts:
    """What a host has, and what share of it to plan with."""

    cores: int = 16
    gpus: int = 1
    gbit: float = 25.0  # the network of the Redis host, in each direction
    use: float = 0.7
    gpu_images_per_second: float = 0.0
    model_ms: float = 0.0  # CPU of an image in the model, where it has no GPU
    batch: float = 16.0  # images in a batch, on average
    replicas: int = 0  # of each Redis


@dataclass(frozen=True)
class Plan:
    """What a load needs, in all."""

    load: float  # images/s
    cells: int
    web_cores: float
    web_hosts: int
    redis_cores: float
    model_servers: int
    model_cores: float
    gpus: int
    model_hosts: int
    upload_gbit: float  # from the clients to the web
    redis_gbit: float  # into the Redis servers; as much leaves them for the model servers, and again for each replica

    @property
    def fits_one_host(self) -> bool:
        """Whether one host is enough for all of it."""
        return self.web_hosts == self.model_hosts == 0


def plan(load: float, mix: dict[str, float], costs: Costs, hosts: Hosts) -> Plan:
    """Return what `load` images/s of these pictures need; `mix` has the share of each."""
    mean = {name: sum(share * values[picture] for picture, share in mix.items())
            for name, values in (("web_ms", costs.web_ms), ("bytes", costs.file_bytes))}  # fmt: skip
    cells = cells_for(load, costs, hosts)
    each = load / cells
    web, redis = cores(each, mean["web_ms"], hosts), cores(each, costs.redis_ms, hosts)
    taking = cores(each, costs.taking_ms(hosts.batch), hosts)
    model = taking + cores(each, hosts.model_ms, hosts)
    gpus = math.ceil(each / hosts.gpu_images_per_second / hosts.use) if hosts.gpu_images_per_second else 0
    servers = max(1, gpus, math.ceil(taking))
    model_hosts = max(math.ceil(model / hosts.cores), math.ceil(gpus / hosts.gpus), 1)
    together = cells == 1 and web + redis + model <= hosts.cores and gpus <= hosts.gpus
    web_hosts = 0 if together else math.ceil(web / hosts.cores) * cells
    return Plan(
        load, cells, web * cells, web_hosts, redis * cells, servers * cells, model * cells, gpus * cells,
        0 if together else model_hosts * cells, gbit(load * mean["bytes"]), gbit(load * costs.job_bytes),
    )  # fmt: skip


def cells_for(load: float, costs: Costs, hosts: Hosts) -> int:
    """Return how many Redis servers are needed: for their CPU, and for what they send."""
    sent = gbit(load * costs.job_bytes) * (1 + hosts.replicas)
    return max(1, math.ceil(cores(load, costs.redis_ms, hosts)), math.ceil(sent / (hosts.gbit * hosts.use)))


def cores(load: float, ms: float, hosts: Hosts) -> float:
    """Return the cores for `load` images/s that take `ms` of CPU each."""
    return load * ms / 1000 / hosts.use


def gbit(bytes_per_second: float) -> float:
    """Return the same in Gbit/s."""
    return bytes_per_second * 8 / 1e9


def capacity(costs_ms: dict[str, float], model: float, available: float) -> float:
    """Return the images/s of programs on the same cores: those of the model, or fewer if the CPU ends first.

    `costs_ms` has the CPU of an image by program, `model` the images/s that the models compute.
    """
    return min(model, available * 1000 / sum(costs_ms.values()))


HEAD = ("images/s", "cells", "web: cores, hosts", "Redis: cores", "model servers", "their cores, hosts", "GPUs",
        "Gbit/s: uploads, to Redis")  # fmt: skip


def row(needed: Plan) -> str:
    """Return a plan as a row of a Markdown table."""
    web, model = [f"{hosts:,}" if hosts else "the same host" for hosts in (needed.web_hosts, needed.model_hosts)]
    cells = (f"{needed.load:,.0f}", f"{needed.cells:,}", f"{short(needed.web_cores)}, {web}", short(needed.redis_cores),
             f"{needed.model_servers:,}", f"{short(needed.model_cores)}, {model}", f"{needed.gpus:,}",
             f"{short(needed.upload_gbit)}, {short(needed.redis_gbit)}")  # fmt: skip
    return f"| {' | '.join(cells)} |"


def short(value: float) -> str:
    """Return a number with two digits, or all before the point."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def parsed_mix(text: str, costs: Costs) -> dict[str, float]:
    """Return the shares in a text such as jpeg-90kB=0.8,png-432kB=0.2. Raises ValueError."""
    mix = {name: float(share) for name, _, share in (part.partition("=") for part in text.split(","))}
    unknown = set(mix) - set(costs.web_ms)
    if unknown:
        raise ValueError(f"no costs of {', '.join(sorted(unknown))}; there are those of {', '.join(costs.web_ms)}")
    if abs(sum(mix.values()) - 1) > 0.001:
        raise ValueError("the shares must add up to 1")
    return mix


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images-per-second", type=float, nargs="+", required=True, help="one or more loads")
    add("--mix", default=MIX, help="the share of each picture in costs.json (default: %(default)s)")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--gpu-images-per-second", type=float, default=0.0, help="of the model on one GPU")
    model.add_argument("--model-ms", type=float, default=0.0, help="CPU of an image in the model, without a GPU")
    add("--cores", type=int, default=Hosts.cores, help="of a host (default: %(default)s)")
    add("--gpus", type=int, default=Hosts.gpus, help="of a host (default: %(default)s)")
    add("--gbit", type=float, default=Hosts.gbit, help="network of a Redis host, Gbit/s (default: %(default)s)")
    add("--use", type=float, default=Hosts.use, help="share of cores, GPUs and network to use (default: %(default)s)")
    add("--batch", type=float, default=Hosts.batch, help="images in a batch, on average (default: %(default)s)")
    add("--replicas", type=int, default=Hosts.replicas, help="of each Redis (default: %(default)s)")
    add("--costs", type=Path, default=COSTS, help="JSON file (default: costs.json beside this program)")
    given = parser.parse_args()
    costs = Costs.load(given.costs)
    hosts = Hosts(**{each.name: getattr(given, each.name) for each in fields(Hosts)})
    try:
        mix = parsed_mix(given.mix, costs)
    except ValueError as error:
        parser.error(f"--mix: {error}")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for load in given.images_per_second:
        print(row(plan(load, mix, costs, hosts)))


if __name__ == "__main__":
    main()
