"""The data of a run: tokenized sources as mixtures, with stored features where the encoder is frozen."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from vlm_jax.build.network import Network
from vlm_jax.build.published import load_tokenizer, tokenizer_folder
from vlm_jax.compress import catalog
from vlm_jax.core import specs
from vlm_jax.core.specs import DataSpec, RunSpec, SourceSpec
from vlm_jax.data import chat_formats, conversations, tokenized
from vlm_jax.data import features as feature_store
from vlm_jax.data.conversations import Conversation
from vlm_jax.data.examples import Turn
from vlm_jax.data.packing import RowLayout
from vlm_jax.data.readers.mixture import epoch_counts
from vlm_jax.data.readers.open import open_source
from vlm_jax.data.tokenized import Mixture
from vlm_jax.data.views import BadImages, Data, Features, read_pixels
from vlm_jax.distributed import partitioning
from vlm_jax.models.vlm import Vlm

_VERSION = 1  # of rendering and tokenizing: a change makes token files anew
_STORES: dict[tuple[Path, str], feature_store.Stored] = {}  # open feature stores


def data_sets(spec: RunSpec) -> list[tuple[str, DataSpec, tuple[SourceSpec, ...]]]:
    """(name, settings, sources) of the training data of each stage, stages with the same data once, and of the test."""
    found: list[tuple[str, DataSpec, tuple[SourceSpec, ...]]] = []
    for stage in spec.stages:
        data = specs.data_of(spec, stage)
        if data not in [other for _, other, _ in found]:
            found.append((stage.name, data, data.train))
    return [*found, ("test", spec.data, spec.data.test)] if spec.data.test else found


def spec_layout(spec: RunSpec, data: DataSpec) -> RowLayout:
    """The row layout of a run's model for some data."""
    return row_layout(Vlm(spec.model, spec.compute), data)


def row_layout(model: Vlm, spec: DataSpec) -> RowLayout:
    """The row layout of a model for some data."""
    shares_image = spec.shares_image and catalog.shares_image(model.spec, model.compute)
    leaving = catalog.leaving(model.spec)
    return RowLayout(model.visual_tokens, model.spec.mask, model.reads_question, shares_image, leaving)


def open_data(network: Network, spec: DataSpec, sources: Sequence[SourceSpec], cache_dir: Path) -> Data:
    """Tokenized sources as one mixture, with stored features where the encoder is frozen. Raises `UserError`."""
    mixture = open_mixture(spec, sources, cache_dir, blind=not network.model.visual_tokens)
    encoder = network.model.spec.encoder
    encoder = dataclasses.replace(encoder, resize=spec.resize or encoder.resize)  # a stage may have its own
    data = Data(mixture, spec, row_layout(network.model, spec), encoder, BadImages(mixture, spec.max_bad_share))
    if not spec.frozen_features or not network.model.visual_tokens:
        return data
    return data._replace(
        features=tuple(_features(network, data, part, cache_dir / "features") for part in range(len(mixture.parts)))
    )


def open_mixture(spec: DataSpec, sources: Sequence[SourceSpec], cache_dir: Path, blind: bool = False) -> Mixture:
    """The tokenized conversations of some sources, without their images for a model without visual tokens. Raises
    `UserError`.
    """
    tokenizer = load_tokenizer(spec.tokenizer)
    chat_format = chat_formats.format_named(spec.format, tokenizer)
    key = f"{tokenized.folder_fingerprint(tokenizer_folder(spec.tokenizer))} {chat_format} {blind} {_VERSION}"

    def tokenize(turns: Sequence[Turn], images: int) -> Conversation:
        turns, images = (conversations.without_images(turns), 0) if blind else (turns, images)
        return conversations.tokenize(chat_format, tokenizer, turns, images)

    def bare_ids(turns: Sequence[Turn]) -> list[int]:
        return tokenizer.encode(conversations.bare_question(turns))

    opened = [open_source(source, cache_dir) for source in sources]
    parts = [
        tokenized.open_tokenized(source, s.separate, tokenize, bare_ids, key, cache_dir / "tokens")
        for source, s in zip(opened, sources, strict=True)
    ]
    names = [s.name or source.name for source, s in zip(opened, sources, strict=True)]
    names = [f"{name} {before + 1}" if (before := names[:i].count(name)) else name for i, name in enumerate(names)]
    items = [part.items for part in parts]
    passes = [count / n for count, n in zip(epoch_counts(sources, items), items, strict=True)]
    return tokenized.mix(parts, names, passes)


def _features(network: Network, data: Data, number: int, folder: Path) -> Features:
    """The stored features of a part; images that cannot be decoded are added to `data.bad`."""
    spec, model, part = network.spec, network.model, data.mixture.parts[number]
    # With several processes, each encodes on its own devices.
    local = dataclasses.replace(spec.compute, strategy="replicated", mesh=(-1, 1, 1), slices=1)
    plan = network.plan if jax.process_count() == 1 else partitioning.make_plan(local, jax.local_devices())
    # Runs share features if they read the same: taps count where they are read.
    reads = catalog.row(model.spec.compressor.name).reads
    encoder = data.encoder if "taps" in reads else dataclasses.replace(data.encoder, taps=())
    settings = {**dataclasses.asdict(encoder), "dtype": spec.compute.dtype}
    key = feature_store.key(part.images_fingerprint, network.encoder_sha256, settings)
    if not part.image_count:  # text only
        shape = jax.ShapeDtypeStruct((1, data.encoder.image_size, data.encoder.image_size, 3), np.uint8)
        none = feature_store.empty(jax.eval_shape(model.features, {"encoder": network.encoder}, shape), 0)
        return lambda numbers: none
    if (folder, key) not in _STORES:
        weights = jax.device_put({"encoder": network.encoder}, plan.replicated)
        encode = plan.jit(model.features)
        images = feature_store.Images(
            part.image_count,
            part.image,
            lambda n: read_pixels(part, np.array([n]), data.encoder)[0],
            data.encoder.image_size,
            part.source.name,
        )
        store = feature_store.open_or_compute(folder, key, images, lambda pixels: encode(weights, pixels))
        _STORES[folder, key] = store
    for image, reason in _STORES[folder, key].bad.items():
        data.bad.add(number, image, reason)
    return _STORES[folder, key].read
