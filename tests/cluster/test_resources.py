from rlhf_ray.cluster.session import describe_resources


def test_resources_are_described_in_words() -> None:
    assert describe_resources({"CPU": 2.0, "GPU": 1.0, "memory": 5e9}) == "2 CPU, 1 GPU"
    assert describe_resources({"CPU": 0.5}) == "0.5 CPU"
    assert describe_resources({"memory": 5e9}) == "no CPU or GPU"
