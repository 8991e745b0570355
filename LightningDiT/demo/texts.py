"""What the page says, in English and Chinese."""

from __future__ import annotations

from LightningDiT.errors import LightningDiTError, in_chinese

ENGLISH, CHINESE = "en", "zh"
#: What each language is called in itself.
LANGUAGES = {ENGLISH: "English", CHINESE: "中文"}
TEXTS: dict[str, tuple[str, str]] = {
    "title": ("LightningDiT samples", "LightningDiT 采样"),
    "language": ("Language", "语言"),
    "model": ("Model", "模型"),
    "classes": ("Classes", "类别"),
    "classes_info": ("type to search; names or numbers", "输入即可搜索；名称或编号"),
    "conditions": ("Conditions", "条件"),
    "conditions_info": ("none chosen: the null condition", "不选则为空条件"),
    "each": ("Images of each", "每类图像数"),
    "seed": ("Seed", "随机种子"),
    "guidance": ("Guidance scale", "引导强度"),
    "guidance_info": ("1 is off", "1 为关闭"),
    "solver": ("Solver", "求解器"),
    "steps": ("Steps", "步数"),
    "steps_info": ("0: the solver's own", "0：求解器自己的"),
    "sample": ("Sample", "采样"),
    "stop": ("Stop", "停止"),
    "another": ("New seed", "换种子"),
    "command": ("Command that makes the same images", "重现这些图像的命令"),
    "start": ("Choose classes and press Sample.", "选择类别，然后按“采样”。"),
    "waiting": ("Waiting: {ahead} ahead of you.", "等待中：前面还有 {ahead} 人。"),
    "loading": ("Loading the model.", "正在加载模型。"),
    "sampling": (
        "{finished} of {total} images finished; step {step} of {steps}.",
        "已完成 {finished} / {total} 张图像；第 {step} / {steps} 步。",
    ),
    "done": (
        "{total} images in {seconds}, {nfe} evaluations each ({solver}). Files: {folder}",
        "{total} 张图像，用时 {seconds}，每张求值 {nfe} 次（{solver}）。文件：{folder}",
    ),
    "stopped": (
        "Stopped; {finished} of {total} images are finished. Files: {folder}",
        "已停止；完成 {finished} / {total} 张图像。文件：{folder}",
    ),
    "error": ("Not possible: {message}.", "无法进行：{message}。"),
    "fix": ("What helps: {fix}.", "解决办法：{fix}。"),
    "unexpected": (
        "An unexpected error ({message}); the console of the page has its traceback.",
        "意外错误（{message}）；页面的控制台有详细信息。",
    ),
    "time": ("time, {unit}", "时间，{unit}"),
    "speed": ("speed, {unit}", "速度，{unit}"),
    "columns": ("columns", "列"),
    "rows": ("rows", "行"),
    "seconds": ("{seconds:.1f} s", "{seconds:.1f} 秒"),
}


def say(key: str, language: str, **values: object) -> str:
    """Return a text in a language, its values filled in."""
    return TEXTS[key][language == CHINESE].format(**values)


def error_text(error: LightningDiTError, language: str) -> str:
    """Return an error and its fix in a language; the message itself is English."""
    text = say("error", language, message=error.message)
    if not error.fix:
        return text
    fix = (language == CHINESE and in_chinese(error.fix)) or error.fix
    return f"{text} {say('fix', language, fix=fix)}"
