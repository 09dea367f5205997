"""Jobs that the renderers' tests share: a small one, and one that sets everything."""

from __future__ import annotations

from megamask.launch.job import Job, KubernetesOptions, Mount, SecretKey, SlurmOptions

IMAGE = "images.example/megamask@sha256:" + "0" * 64

SMALL = Job(name="tiny", nodes=2, ranks_per_node=1, config="configs/run/tiny.yaml", run_dir="runs/tiny", image=IMAGE)

FULL = Job(
    name="dense-7b",
    nodes=4,
    ranks_per_node=8,
    gpus_per_node=8,
    cpus_per_rank=12,
    memory_gib=1600,
    time_limit_s=2 * 86400 + 3600,
    config="configs/run/8b.yaml",
    config_text="run:\n  name: dense-7b\n",
    overrides=("training.steps=1000", "run.output_dir=/ckpt/it's here"),
    run_dir="/ckpt/it's here/dense-7b",
    notice_s=300,
    environment={"NCCL_SOCKET_IFNAME": "=eth0", "NOTE": 'a $(touch /tmp/x) `b` "c"'},
    secrets={"MLFLOW_TRACKING_PASSWORD": SecretKey(secret="mlflow", key="password"), "SITE_TOKEN": None},
    image=IMAGE,
    mounts=(Mount(source="/lustre/data", target="/data", is_read_only=True), Mount(source="/ckpt", target="/ckpt")),
    workdir="/work",
    slurm=SlurmOptions(
        partition="gpu",
        account="lm",
        qos="long",
        constraint="h100",
        reservation="lm1",
        gpu_type="h100",
        container="pyxis",
        exclude=("node7", "node9"),
        mail="team@example.org",
        extra=("--switches=1",),
    ),
    kubernetes=KubernetesOptions(
        namespace="training",
        queue="train-lq",
        priority_class="pretrain",
        required_topology="cloud.provider.com/topology-block",
        node_selector={"nvidia.com/gpu.product": "NVIDIA-H200"},
        tolerations=("nvidia.com/gpu",),
        rdma_resource="rdma/ib",
        shm_gib=256,
        tmp_gib=50,
        claims={"ckpt": "/ckpt"},
        service_account="trainer",
    ),
)
