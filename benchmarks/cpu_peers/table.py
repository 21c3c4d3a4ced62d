"""The rows of the CPU benchmark."""

from dataclasses import dataclass

from pipeline.hardware import cpu_has_bf16


@dataclass(frozen=True)
class Subject:
    """One row. `module` is in this package; `variant` goes to its `convert` and `load`."""

    name: str
    module: str
    variant: str
    package: str
    """The distribution that runs it; its version is stated."""
    files: str
    """Pattern of the files that hold the converted model."""
    peer: bool = False
    """Whether it runs in the peers' environment."""

    def why_not(self) -> str | None:
        """What this machine lacks for it."""
        if self.variant == "bf16" and not cpu_has_bf16():
            return "this CPU has no bf16 instructions (AMX or AVX512-BF16); it would emulate them"
        return None


OURS = "ours INT8"
FP32 = "torch FP32"
_IR = "openvino_model.*"
SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(OURS, "ours", "int8", "openvino", _IR),
        Subject("ours FP32 IR", "ours", "fp32", "openvino", _IR),
        Subject("ours BF16", "ours", "bf16", "openvino", _IR),
        Subject("ours FP16 IR", "ours", "fp16", "openvino", _IR),
        Subject(FP32, "eager", "fp32", "torch", "*.safetensors"),
        Subject("torch BF16", "eager", "bf16", "torch", "*.safetensors"),
        Subject("optimum-intel INT8", "optimum_intel", "int8", "optimum-intel", _IR),
        Subject("llama.cpp Q8_0", "llama", "plain", "llama-cpp-python", "*.gguf", peer=True),
        Subject("llama.cpp Q8_0, flash", "llama", "flash", "llama-cpp-python", "*.gguf", peer=True),
        Subject("CTranslate2 int8", "ctranslate", "int8", "ctranslate2", "model.bin", peer=True),
        Subject("ONNX Runtime int8", "onnx_runtime", "int8", "onnxruntime", "model.onnx", peer=True),
    )
}
