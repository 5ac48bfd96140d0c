"""Start a Ray cluster on this machine, then apply each configuration of Ray Serve that arrives as a line on stdin.

Arguments: the folder for Ray's files and the port of the proxy. Each line of stdout is the reply to one line of stdin.
"""

import sys

import orjson
import ray
from ray import serve
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema


def main(folder: str, port: int) -> None:
    ray.init(
        num_cpus=2,
        object_store_memory=400_000_000,
        include_dashboard=False,
        namespace="serve",
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )
    client = serve_start(http_options={"host": "127.0.0.1", "port": port})
    sys.stdout.write("started\n")
    sys.stdout.flush()
    for line in sys.stdin:
        client.deploy_apps(ServeDeploySchema.model_validate(orjson.loads(line)), _blocking=False)
        sys.stdout.write("deployed\n")
        sys.stdout.flush()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
