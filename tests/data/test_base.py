from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numbered import NumberedDataModule, Recorder
from torch.utils.data import DataLoader, SequentialSampler
from torchvision.transforms.v2.functional import normalize

from tests.data.ddp_numbers import see
from tests.distributed import run_distributed
from tests.trainers import trainer


def numbers(data, batches) -> list[list[int]]:
    return [data.numbers(images) for images, _ in batches]


def flat(lists: list[list[int]]) -> list[int]:
    return [number for numbers in lists for number in numbers]


class TestLoaders:
    @pytest.mark.parametrize(
        ("batch_size", "sizes"),
        [(16, [16] * 5), (79, [79, 1]), (81, [80]), (1000, [80]), (1, [1] * 80)],
        ids=["even", "last batch of one", "one more than there are", "far more than there are", "one by one"],
    )
    def test_every_image_once_whatever_the_batch_size(self, batch_size, sizes):
        data = NumberedDataModule(batch_size=batch_size)
        data.setup("fit")
        batches = list(data.train_dataloader())
        assert [len(labels) for _, labels in batches] == sizes
        assert sorted(flat([images[:, 0, 0, 0].tolist() for images, _ in batches])) == sorted(
            data.train_set.images[:, 0, 0, 0]
        )

    def test_training_alone_is_shuffled_anew_each_epoch_and_by_the_torch_seed(self):
        data = NumberedDataModule()
        data.setup("fit")
        data.setup("test")

        def order(loader: DataLoader) -> list[int]:
            return [int(image[0, 0, 0]) for images, _ in loader for image in images]

        torch.manual_seed(0)
        loader = data.train_dataloader()
        first, second = order(loader), order(loader)
        assert first != second
        assert sorted(first) == sorted(second)
        assert order(data.train_dataloader()) not in (first, second)
        torch.manual_seed(0)
        assert order(data.train_dataloader()) == first
        for other in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
            assert isinstance(other.sampler, SequentialSampler)
            assert order(other) == order(other)

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_memory_is_pinned_for_cuda_alone(self, device):
        data = NumberedDataModule()
        data.setup("fit")
        data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
        assert data.val_dataloader().pin_memory == (device == "cuda")


class TestSplit:
    @pytest.mark.parametrize(
        ("stage", "reads"), [("fit", [True]), ("validate", [True]), ("test", [False]), ("predict", [False])]
    )
    def test_the_test_images_are_read_for_test_and_predict_alone(self, stage, reads):
        data = NumberedDataModule()
        data.setup(stage)
        assert data.reads == reads

    @pytest.mark.parametrize("val_fraction", [0.05, 0.2, 0.5])
    def test_validation_is_stratified_and_apart_from_training(self, val_fraction):
        data = NumberedDataModule(val_fraction=val_fraction)
        data.setup("fit")
        assert np.bincount(data.val_set.labels).tolist() == [20 * val_fraction] * 5
        numbers = np.concatenate([data.train_set.images[:, 0, 0, 0], data.val_set.images[:, 0, 0, 0]])
        assert sorted(numbers) == list(range(100))
        assert (data.val_set.images[:, 0, 0, 0] % 5 == data.val_set.labels).all()

    def test_the_seed_draws_it(self):
        def drawn(seed: int) -> list[int]:
            data = NumberedDataModule(seed=seed)
            data.setup("validate")
            return data.val_set.images[:, 0, 0, 0].tolist()

        assert drawn(0) == drawn(0)
        assert sorted(drawn(0)) != sorted(drawn(1))


class TestInTheTrainer:
    def test_images_of_every_stage(self):
        data, recorder = NumberedDataModule(), Recorder()
        run = trainer()
        run.fit(recorder, datamodule=data)
        train, val = numbers(data, recorder.seen["train"]), numbers(data, recorder.seen["val"])
        assert sorted({*flat(train), *flat(val)}) == list(range(100))
        assert set(flat(train)).isdisjoint(flat(val))
        assert data.reads == [True]
        run.test(recorder, datamodule=data, verbose=False)
        run.predict(recorder, datamodule=data)
        assert flat(numbers(data, recorder.seen["test"])) == list(range(100, 150))
        assert flat(numbers(data, recorder.seen["predict"])) == list(range(100, 150))

    def test_normalized_as_torchvision_does(self):
        data, recorder = NumberedDataModule(), Recorder()
        trainer().test(recorder, datamodule=data, verbose=False)
        images = torch.tensor(data.test_set.images[:16]) / data.max_value
        expected = normalize(images, data.mean, data.std)
        torch.testing.assert_close(recorder.seen["test"][0][0], expected)

    @pytest.mark.parametrize(
        ("precision", "dtype"),
        [
            ("32-true", torch.float32),
            ("64-true", torch.float64),
            ("bf16-true", torch.bfloat16),
            ("16-true", torch.float16),
            ("bf16-mixed", torch.float32),
        ],
    )
    def test_images_have_the_precision_of_the_weights(self, precision, dtype):
        recorder = Recorder()
        trainer(precision=precision, limit_train_batches=1, num_sanity_val_steps=1).fit(
            recorder, datamodule=NumberedDataModule()
        )
        for stage in ("train", "val"):
            images, labels = recorder.seen[stage][0]
            assert images.dtype == dtype
            assert labels.dtype == torch.int64

    def test_augmented_in_training_alone(self):
        class Negative(NumberedDataModule):
            def augment_batch(self, images):
                assert images.dtype == torch.uint8
                return 200 - images

        data, recorder = Negative(), Recorder()
        run = trainer()
        run.fit(recorder, datamodule=data)
        run.test(recorder, datamodule=data, verbose=False)
        run.predict(recorder, datamodule=data)
        val = set(flat(numbers(data, recorder.seen["val"])))
        assert val == set(data.val_set.images[:, 0, 0, 0].tolist())
        assert {200 - n for n in flat(numbers(data, recorder.seen["train"]))} == set(range(100)) - val
        assert flat(numbers(data, recorder.seen["test"])) == list(range(100, 150))
        assert flat(numbers(data, recorder.seen["predict"])) == list(range(100, 150))


def test_two_processes_see_disjoint_halves():
    first, second = run_distributed(see)
    # 80 training images, 40 for each process: batches of 16, 16 and 8, in each of two epochs.
    assert [len(batch) for batch in first["train"]] == [len(batch) for batch in second["train"]] == [16, 16, 8] * 2
    for half in (slice(0, 3), slice(3, 6)):
        mine, others = flat(first["train"][half]), flat(second["train"][half])
        assert set(mine).isdisjoint(others)
        assert len({*mine, *others}) == 80
    assert set(flat(first["train"][:3])) != set(flat(first["train"][3:]))
    assert set(flat(first["val"])).isdisjoint(flat(second["val"]))
    assert len({*flat(first["val"]), *flat(second["val"])}) == 20
