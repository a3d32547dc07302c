from rlhf_ray.cluster.topology import describe


def test_resources_are_described_in_words() -> None:
    assert describe({"CPU": 2.0, "GPU": 1.0, "memory": 5e9}) == "2 CPU, 1 GPU"
    assert describe({"fast_disk": 1.0, "CPU": 0.5, "node:10.0.0.1": 1.0}) == "0.5 CPU, 1 fast_disk"
    assert describe({"memory": 5e9}) == "no CPU or GPU"
