"""Roads through libraries, in this process. Each gives the largest difference to what `apply` gives."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tldr_compile
from benchmarks.roads.subjects import SCHEDULE, Encoder, clips, pixels, videomae


def _far(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max())


def _merged(model: nn.Module, **kwargs: Any) -> tldr_compile.MergedModule:
    return tldr_compile.apply(model, (), kwargs, schedule=SCHEDULE)


def _compiled(model: nn.Module) -> nn.Module:
    """In place, for libraries that want the model itself."""
    torch.compiler.reset()
    model.compile(backend="tldr", options={"schedule": SCHEDULE})
    return model


def _trained(model: nn.Module) -> dict[str, Tensor]:
    from transformers import Trainer, TrainingArguments  # noqa: PLC0415 - seconds to import

    data = [{"pixel_values": clip, "labels": label} for clip, label in zip(pixels(4), torch.arange(4) % 3, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, optim="sgd", max_grad_norm=0.0,
            lr_scheduler_type="constant", use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        trainer.save_model(folder)
        assert list(Path(folder).glob("*.safetensors"))
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def _step() -> dict[str, Tensor]:
    """What one step of plain gradient descent makes of the weights."""
    model = videomae().train()
    merged = _merged(model, pixel_values=pixels(4), labels=torch.arange(4) % 3)
    optimizer = torch.optim.SGD(merged.parameters(), 1e-2)
    merged(pixel_values=pixels(4), labels=torch.arange(4) % 3).loss.backward()
    optimizer.step()
    return dict(merged.named_parameters())


def _farthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return max(_far(found[name], wanted[name]) for name in wanted)


def trainer_merged() -> float:
    model = videomae().train()
    merged = _merged(model, pixel_values=pixels(4), labels=torch.arange(4) % 3)
    return _farthest(_trained(merged), _step())


def trainer_compiled() -> float:
    return _farthest(_trained(_compiled(videomae().train())), _step())


def _answers(put: Any) -> list[float]:
    """What a pipeline says of a clip in a file, with `put(pipeline)` done before."""
    import av  # noqa: PLC0415 - optional
    from transformers import VideoMAEImageProcessor, pipeline  # noqa: PLC0415 - seconds to import

    size = {"height": 32, "width": 32}
    processor = VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    pipe = pipeline("video-classification", model=videomae(), image_processor=processor, device="cpu")
    put(pipe)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/clip.mp4"
        with av.open(path, "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
            for frame in np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        found = {each["label"]: each["score"] for each in pipe(path, top_k=3)}
    return [found[label] for label in sorted(found)]


def _put_merged(pipe: Any) -> None:
    pipe.model = _merged(pipe.model, pixel_values=pixels(1))


def pipelines() -> float:
    """With the model compiled in place, and with a merged one in its place."""
    found = _answers(lambda pipe: _compiled(pipe.model))
    return _far(torch.tensor(found), torch.tensor(_answers(_put_merged)))


def accelerate() -> float:
    from accelerate import Accelerator  # noqa: PLC0415 - optional

    merged = _merged(videomae(), pixel_values=pixels())
    wanted = merged(pixels()).logits
    accelerator = Accelerator(cpu=True)
    prepared, _ = accelerator.prepare(merged, torch.optim.SGD(merged.parameters(), 0.1))
    assert accelerator.unwrap_model(prepared) is merged
    return _far(prepared(pixels()).logits, wanted)


def peft() -> float:
    """The adapters learn, and with their weights merged into the layers the answer is the same."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - optional

    config = LoraConfig(target_modules=["query", "value"], r=2, init_lora_weights=False)
    model = get_peft_model(videomae(), config).eval()
    merged = _merged(model, pixel_values=pixels())
    found = merged(pixel_values=pixels()).logits
    found.sum().backward()
    learns = {name.rsplit(".", 3)[1] for name, value in merged.named_parameters() if value.grad is not None}
    assert learns == {"lora_A", "lora_B"}, learns
    return _far(found, _merged(model.merge_and_unload(), pixel_values=pixels())(pixels()).logits)


def torchao() -> float:
    """Layers that are quantised after merging, and before where only weights are: the same numbers."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig as Dynamic  # noqa: PLC0415 - optional
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # noqa: PLC0415 - optional

    with torch.no_grad():
        merged = _merged(videomae(), pixel_values=pixels())
        wide, found = merged(pixels()).logits, []
        for config in (Int8WeightOnlyConfig(), Dynamic()):
            after = copy.deepcopy(merged)
            quantize_(after, config)
            found.append(after(pixels()).logits)
            assert 0 < _far(found[-1], wide) < 0.01
        before = videomae()
        quantize_(before, Int8WeightOnlyConfig())
        return _far(found[0], _merged(before, pixel_values=pixels())(pixels()).logits)


def diffusers() -> float:
    from diffusers import WanTransformer3DModel  # noqa: PLC0415 - optional

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32, "freq_dim": 16}
    model = WanTransformer3DModel(**sizes, in_channels=4, out_channels=4, text_dim=16, rope_max_seq_len=32).eval()
    noise, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 8, 16)
    inputs = {"hidden_states": noise, "timestep": torch.tensor([10]), "encoder_hidden_states": text}
    with torch.no_grad():
        wanted = _merged(model, **inputs)(**inputs).sample
        return _far(_compiled(model)(**inputs).sample, wanted)


class _Frames(nn.Module):
    """A model of pictures on clips `[B, 3, T, H, W]`: the frames are its batch, and the mean of its answers counts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, clip: Tensor) -> Tensor:
        logits: Tensor = self.model(clip.transpose(1, 2).flatten(0, 1))
        return logits.unflatten(0, (clip.shape[0], -1)).mean(1)


def timm() -> float:
    """A picture transformer on frames, compiled in place."""
    from timm import create_model  # noqa: PLC0415 - optional

    torch.manual_seed(0)
    sizes = {"img_size": 64, "depth": 2, "num_classes": 5}
    model = _Frames(create_model("vit_tiny_patch16_224", pretrained=False, **sizes)).eval()
    clip = torch.randn(2, 3, 4, 64, 64)
    with torch.no_grad():
        wanted = tldr_compile.apply(model, (clip,), schedule=SCHEDULE)(clip)
        assert _far(model(clip), wanted) > 1e-3
        return _far(_compiled(model)(clip), wanted)


def reexport() -> float:
    """Exported again with the dynamic shapes that the model takes."""
    shapes = {"clip": {0: torch.export.Dim("clips", min=1, max=8)}}
    merged = tldr_compile.apply(Encoder().eval(), (clips(),), schedule=SCHEDULE, dynamic_shapes=shapes)
    again = torch.export.export(merged, (clips(),), dynamic_shapes=shapes)
    return _far(again.module()(clips(5)), merged(clips(5)))


def deepcopy() -> float:
    merged = tldr_compile.apply(Encoder().eval(), (clips(),), schedule=SCHEDULE)
    return _far(copy.deepcopy(merged)(clips()), merged(clips()))


def pt2e() -> float:
    """Quantised with torchao's PT2E flow in a portable program: how far int8 takes the logits."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e  # noqa: PLC0415 - optional
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86  # noqa: PLC0415 - optional

    with torch.no_grad():
        merged = tldr_compile.apply(Encoder().eval(), (clips(),), schedule=SCHEDULE, portable=True)
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(merged, (clips(),)).module(), quantizer)
        prepared(clips())
        converted = convert_pt2e(prepared)
        assert any("quantize_per" in str(node.target) for node in converted.graph.nodes)
        return _far(converted(clips()), merged(clips()))
