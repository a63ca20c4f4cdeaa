//! What can be typed. Types only: nothing here reads a file or decides anything.

mod eval;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use self::eval::{EvalArgs, GateArgs, OutputArgs, ProtocolArg, ProtocolArgs, QuestionArgs};
use crate::backend::kv_cache::KvCache;
use crate::calib::choose::Effort;
use crate::dialect::DIALECTS;
use crate::memory::{Bytes, Limits};
use crate::recipe::formats::FORMATS;
use crate::scheme::fit::ScaleRule;

const EXAMPLES: &str = "Examples:
  quant convert --format mxfp4                          the embedded model: convert, load back, measure
  quant convert ./Llama-3.2-1B --format q4_k_m -o llama-3.2-1b.gguf
  quant convert Qwen/Qwen3-0.6B --format mxfp4,int8 -o out --json report.json
  quant convert ./model --format q4_k_m --dry-run       what would be written, and who can load it
  quant eval out/model.gguf --baseline ./model --ppl --kld
  quant eval out/model.gguf --baseline ./model --slices all --max-kld 0.05 --max-kld code=0.1 --min-top1 0.95
  quant sensitivity --format q4_0                       which tensors cost most
  quant inspect out/model.gguf

Results go to standard output, progress and notes to standard error.
Exit status: 0 ok, 1 a quality gate failed, 2 bad usage or input.";

/// Quantize Hugging Face checkpoints and measure what was written
#[derive(Parser, Debug)]
#[command(name = "quant", version, about, after_help = EXAMPLES, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
}

/// Options of every command.
#[derive(Args, Clone, Debug)]
pub struct Global {
    /// Print results and errors only
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Print every tensor and every decision
    #[arg(long, short, global = true)]
    pub verbose: bool,
    /// Worker threads [default: one per core]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
}

/// The subcommands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Quantize a model, load the result back and measure what it lost
    Convert(ConvertArgs),
    /// Measure perplexity and divergence from a baseline
    Eval(Box<EvalArgs>),
    /// Quantize one group of tensors at a time and rank them by what they cost
    Sensitivity(SensitivityArgs),
    /// Write llama.cpp's importance matrix of a model: mean squared inputs over a text
    Calibrate(CalibrateArgs),
    /// Measure speed and memory, beside what the machine can do at best
    Bench(BenchArgs),
    /// Print a model's tensors, formats and sizes
    Inspect(InspectArgs),
    /// Print all formats, their bits, and who loads them
    Formats(FormatsArgs),
    /// Print a shell completion script
    Completions(CompletionsArgs),
}

/// `quant convert`
#[derive(Args, Debug)]
pub struct ConvertArgs {
    /// Folder, safetensors file, GGUF file or hub id [default: the embedded tiny-llama]
    pub model: Option<String>,
    /// Names of formats.
    #[arg(long, short, required = true, value_delimiter = ',', value_name = "FORMAT", help = format_help())]
    pub format: Vec<String>,
    /// Name of a dialect; the format's own if none is given.
    #[arg(long, value_name = "DIALECT", help = dialect_help("Who will read it"))]
    pub dialect: Option<String>,
    /// How codes are chosen
    #[arg(long, value_enum, default_value_t = MethodArg::Auto)]
    pub method: MethodArg,
    /// How the power-of-two scales of mxfp4 are chosen
    #[arg(long, value_enum, default_value_t = ScaleRuleArg::Search)]
    pub scale_rule: ScaleRuleArg,
    /// Columns that share a scale: 32, 64 or 128 [default: the whole row for int8, 128 for int4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub group_size: Option<u32>,
    /// One scheme for every matrix instead of the format's mix (GGUF)
    #[arg(long)]
    pub pure: bool,
    /// What codes are chosen on.
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    /// Importance matrix of llama.cpp (GGUF or .dat) that weighs the errors of round-to-nearest
    #[arg(long, value_name = "FILE")]
    pub imatrix: Option<PathBuf>,
    /// How much time to spend on finding settings that suit the model
    #[arg(long, value_enum, default_value_t = EffortArg::Balanced)]
    pub effort: EffortArg,
    /// Let engines keep keys and values in fp8, with scales from the calibration text (compressed-tensors)
    #[arg(long, value_name = "CACHE")]
    pub kv_cache: Option<KvCache>,
    /// Where to write: a path ending in .gguf is the file itself, anything else a folder [default: ./MODEL-FORMAT]
    #[arg(long, short, value_name = "PATH")]
    pub out: Option<PathBuf>,
    /// Replace an existing output
    #[arg(long)]
    pub force: bool,
    /// How much memory is used.
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Do not go on from what an interrupted run has left, and delete that
    #[arg(long)]
    pub fresh: bool,
    /// Print the plan and stop: schemes, fallbacks, sizes, memory, who can load it
    #[arg(long)]
    pub dry_run: bool,
    /// Do not load the result back and measure it
    #[arg(long)]
    pub no_validate: bool,
    /// Refuse to write any tensor in another scheme than the format asks for
    #[arg(long)]
    pub no_fallback: bool,
    /// Accept a source that is already quantized
    #[arg(long)]
    pub allow_requantize: bool,
    /// Largest safetensors file, in GB (10^9 bytes)
    #[arg(long, value_name = "GB", default_value_t = 5.0)]
    pub shard_size: f64,
    /// Write the report as JSON; - for standard output
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Where the model comes from and where it runs.
    #[command(flatten)]
    pub source: SourceArgs,
    /// How the result is measured.
    #[command(flatten)]
    pub protocol: ProtocolArgs,
}

/// `quant calibrate`
#[derive(Args, Debug)]
pub struct CalibrateArgs {
    /// Folder, safetensors file, GGUF file or hub id [default: the embedded tiny-llama]
    pub model: Option<String>,
    /// Where to write the importance matrix
    #[arg(long, short, value_name = "FILE", default_value = "imatrix.gguf")]
    pub out: PathBuf,
    /// Replace an existing output
    #[arg(long)]
    pub force: bool,
    /// Branch, tag or commit of a hub id
    #[arg(long, value_name = "REV")]
    pub revision: Option<String>,
    /// What the model reads.
    #[command(flatten)]
    pub calibration: CalibrationArgs,
}

/// What codes are chosen on.
#[derive(Args, Clone, Debug)]
pub struct CalibrationArgs {
    /// Calibration text: default, general, chat, languages, or files (.jsonl: `text` or `messages`); several with commas
    #[arg(long, value_name = "NAME|FILE", value_delimiter = ',', default_value = "default")]
    pub calib: Vec<String>,
    /// Calibration tokens
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(1..))]
    pub calib_tokens: u32,
    /// Tokens in a calibration window
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..))]
    pub calib_ctx: u32,
    /// Which windows of a longer text are taken
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub calib_seed: u64,
}

/// `quant sensitivity`
#[derive(Args, Debug)]
pub struct SensitivityArgs {
    /// Folder, safetensors file, GGUF file or hub id [default: the embedded tiny-llama]
    pub model: Option<String>,
    /// The format whose schemes are tried, as for convert
    #[arg(long, short, value_name = "FORMAT")]
    pub format: String,
    /// Name of a dialect; the format's own if none is given.
    #[arg(long, value_name = "DIALECT", help = dialect_help("Whose spelling decides sizes"))]
    pub dialect: Option<String>,
    /// Columns that share a scale (int8): 32, 64 or 128 [default: the whole row]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub group_size: Option<u32>,
    /// Which tensors are quantized together
    #[arg(long, value_enum, default_value_t = GroupArg::Tensor)]
    pub by: GroupArg,
    /// Write the ranking as JSON, which `quant eval --sensitivity` reads; - for standard output
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the ranking as CSV; - for standard output
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Write the ranking as an HTML page with a map of the model; - for standard output
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Where the model comes from and where it runs.
    #[command(flatten)]
    pub source: SourceArgs,
    /// How divergence is measured.
    #[command(flatten)]
    pub protocol: ProtocolArgs,
}

/// `--by`
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupArg {
    /// Each matrix of each layer alone
    Tensor,
    /// The same matrix of all layers
    Role,
    /// All matrices of a layer
    Layer,
}

/// `quant bench`
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Folder, safetensors file, GGUF file or hub id [default: the embedded tiny-llama]
    pub model: Option<String>,
    /// How many sequences are generated together, one or several numbers
    #[arg(long, value_delimiter = ',', value_name = "N", default_value = "1,8,32", value_parser = clap::value_parser!(u16).range(1..))]
    pub batch: Vec<u16>,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt: u32,
    /// Tokens generated after it
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub tokens: u32,
    /// Write the same as JSON; - for standard output
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Where the model comes from and where it runs.
    #[command(flatten)]
    pub source: SourceArgs,
}

/// `quant inspect`
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// Folder, safetensors file, GGUF file or hub id [default: the embedded tiny-llama]
    pub model: Option<String>,
    /// Write the same as JSON; - for standard output
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Branch, tag or commit of a hub id
    #[arg(long, value_name = "REV")]
    pub revision: Option<String>,
}

/// `quant formats`
#[derive(Args, Debug)]
pub struct FormatsArgs {
    /// Write the same as JSON; - for standard output
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// `quant completions`
#[derive(Args, Debug)]
pub struct CompletionsArgs {
    /// The shell to print for
    pub shell: clap_complete::Shell,
}

/// Where models come from and where they run.
#[derive(Args, Clone, Debug)]
pub struct SourceArgs {
    /// Branch, tag or commit of a hub id
    #[arg(long, value_name = "REV")]
    pub revision: Option<String>,
    /// Where models run: auto, cpu or cuda:N
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: String,
}

/// How much memory is used.
#[derive(Args, Clone, Copy, Debug)]
pub struct MemoryArgs {
    /// Most GPU memory to use, such as 12G; what does not fit is streamed [default: what is free]
    #[arg(long, value_name = "SIZE")]
    pub vram: Option<Bytes>,
    /// Most memory of the machine to use, such as 24G [default: what is available]
    #[arg(long, value_name = "SIZE")]
    pub ram: Option<Bytes>,
}

impl From<MemoryArgs> for Limits {
    fn from(args: MemoryArgs) -> Self {
        Limits { vram: args.vram, ram: args.ram }
    }
}

/// `--method`
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum MethodArg {
    /// gptq where it takes minutes, else rtn; says which
    Auto,
    /// Round to nearest after an error-minimising scale search; needs no calibration
    Rtn,
    /// Choose codes layer by layer against the errors they cause on calibration text; slow for large models on a CPU
    Gptq,
}

/// `--effort`
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum EffortArg {
    /// Fixed settings, fewer sweeps
    Fast,
    /// Tries a few strengths on a part of the text: up to twice the time
    Balanced,
    /// Tries damping and smoothing as well: several times as long
    Best,
}

impl From<EffortArg> for Effort {
    fn from(effort: EffortArg) -> Self {
        match effort {
            EffortArg::Fast => Effort::Fast,
            EffortArg::Balanced => Effort::Balanced,
            EffortArg::Best => Effort::Best,
        }
    }
}

/// `--scale-rule`
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleRuleArg {
    /// OCP and ggml: the block's maximum may clip by up to a quarter
    Floor,
    /// compressed-tensors: step up when the maximum passes 7 times the scale
    Even,
    /// Step up when the maximum passes 7.25 times the scale
    #[value(name = "t7.25")]
    T7_25,
    /// Keep the exponent of least squared error
    Search,
}

impl From<ScaleRuleArg> for ScaleRule {
    fn from(rule: ScaleRuleArg) -> Self {
        match rule {
            ScaleRuleArg::Floor => ScaleRule::Floor,
            ScaleRuleArg::Even => ScaleRule::Even,
            ScaleRuleArg::T7_25 => ScaleRule::T7_25,
            ScaleRuleArg::Search => ScaleRule::Search,
        }
    }
}

fn format_help() -> String {
    let names: Vec<_> = FORMATS.iter().map(|format| format.name).collect();
    format!("What to write, one or several; `quant formats` says more: {}", names.join(", "))
}

fn dialect_help(what: &str) -> String {
    let names: Vec<_> = DIALECTS.iter().map(|dialect| dialect.name()).collect();
    format!("{what}: {} [default: the format's own]", names.join(", "))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use crate::manifest::SILENT;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }

    /// Options of `quant convert` that change what is written: a manifest repeats them.
    const RECORDED: [&str; 18] = [
        "--format",
        "--dialect",
        "--method",
        "--scale-rule",
        "--group-size",
        "--pure",
        "--calib",
        "--calib-tokens",
        "--calib-ctx",
        "--calib-seed",
        "--imatrix",
        "--effort",
        "--kv-cache",
        "--no-fallback",
        "--allow-requantize",
        "--shard-size",
        "--device",
        "--precise",
    ];

    #[test]
    fn the_manifest_repeats_every_option_or_leaves_it_out_on_purpose() {
        let mut command = super::Cli::command();
        command.build();
        let convert = command.find_subcommand("convert").unwrap();
        let options = convert.get_arguments().filter(|option| !option.is_positional());
        let mut known = 0;
        for option in options.filter(|option| !matches!(option.get_id().as_str(), "help" | "version")) {
            let long = format!("--{}", option.get_long().unwrap());
            let short = option.get_short().map(|short| format!("-{short}"));
            let takes_value = option.get_action().takes_values();
            let silent = |name: &str| SILENT.iter().find(|(silent, _)| *silent == name);
            let names = [Some(&long), short.as_ref()].into_iter().flatten();
            if RECORDED.contains(&long.as_str()) {
                known += 1;
                assert!(names.into_iter().all(|name| silent(name).is_none()), "{long} is in both lists");
            } else {
                for name in names {
                    known += 1;
                    let listed = silent(name).unwrap_or_else(|| panic!("{name} is in neither list"));
                    assert_eq!(listed.1, takes_value, "whether a value follows {name}");
                }
            }
        }
        assert_eq!(known, RECORDED.len() + SILENT.len(), "a list names an option that is gone");
    }
}
