//! What `quant eval` takes: models, questions, reports, gates.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Args, FromArgMatches, ValueEnum};

use super::{MemoryArgs, SourceArgs};
use crate::backend::kv_cache::KvCache;
use crate::eval::gate::{self, Rule};

/// `quant eval`
#[derive(Args, Debug)]
pub struct EvalArgs {
    /// Folders, safetensors files, GGUF files or hub ids [default: the embedded tiny-llama]
    pub models: Vec<String>,
    /// What to compare with, usually the unquantized model
    #[arg(long, value_name = "MODEL")]
    pub baseline: Option<String>,
    /// Measure perplexity (and its change, given a baseline); the default
    #[arg(long)]
    pub ppl: bool,
    /// Measure KL divergence from the baseline and same-top-1
    #[arg(long, requires = "baseline")]
    pub kld: bool,
    /// Also measure these kinds of content, one or several: all, prose, code, json, digits, chat, german, NAME=FILE
    #[arg(long, value_delimiter = ',', value_name = "SLICE")]
    pub slices: Vec<String>,
    /// Keep the baseline's last hidden states in this folder and compare with them; models are loaded one at a time
    #[arg(long, value_name = "FOLDER", requires = "baseline")]
    pub chunks_cache: Option<PathBuf>,
    /// Also measure with keys and values kept so: bf16, fp8, int8 or int8,group=N; may be given several times
    #[arg(long, value_name = "CACHE")]
    pub kv_cache: Vec<KvCache>,
    /// What models are asked.
    #[command(flatten)]
    pub questions: QuestionArgs,
    /// Where results go.
    #[command(flatten)]
    pub outputs: OutputArgs,
    /// What stops a pipeline.
    #[command(flatten)]
    pub gates: GateArgs,
    /// Where the models come from and where they run.
    #[command(flatten)]
    pub source: SourceArgs,
    /// How much memory is used.
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// How they are measured.
    #[command(flatten)]
    pub protocol: ProtocolArgs,
}

/// Where the results of `quant eval` go.
#[derive(Args, Clone, Debug)]
pub struct OutputArgs {
    /// Write the report as JSON; - for standard output
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the rows as CSV; - for standard output
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Write the report as one HTML page that needs no network; - for standard output
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Write the report as Markdown, for a pull-request comment; - for standard output
    #[arg(long, value_name = "FILE")]
    pub markdown: Option<PathBuf>,
    /// Write the gates as JUnit XML, for a CI server's test tab; - for standard output
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// Show these tensor costs in the reports: JSON of `quant sensitivity`
    #[arg(long, value_name = "FILE")]
    pub sensitivity: Option<PathBuf>,
    /// Show these speeds in the reports, one file or several: JSON of `quant bench`, a file for each model
    #[arg(long, value_delimiter = ',', value_name = "FILE")]
    pub bench: Vec<PathBuf>,
}

/// Quality gates: an option for each of [`gate::RULES`], and a file.
#[derive(Clone, Debug, Default)]
pub struct GateArgs {
    /// TOML file of gates.
    pub file: Option<PathBuf>,
    /// (gate, value) as typed.
    pub limits: Vec<(&'static Rule, String)>,
}

impl Args for GateArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        let heading = "Gates (exit status 1 if one fails)";
        let file = Arg::new("gates").long("gates").value_name("FILE").help_heading(heading);
        let file = file.value_parser(clap::value_parser!(PathBuf)).help("Read limits from a TOML file");
        let limit = |rule: &'static Rule| {
            let option = Arg::new(rule.name).long(rule.name).value_name(rule.value_name()).help(rule.help);
            option.help_heading(heading).action(ArgAction::Append).allow_negative_numbers(true)
        };
        gate::RULES.iter().fold(command.arg(file), |command, rule| command.arg(limit(rule)))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for GateArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut args = GateArgs::default();
        args.update_from_arg_matches(matches)?;
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.file = matches.get_one("gates").cloned();
        for rule in &gate::RULES {
            let values = matches.get_many::<String>(rule.name).into_iter().flatten();
            self.limits.extend(values.map(|value| (rule, value.clone())));
        }
        Ok(())
    }
}

/// What models are asked.
#[derive(Args, Clone, Debug)]
pub struct QuestionArgs {
    /// Let models answer prompt suites: all, arithmetic, chat, code, instructions, json, reasoning, retrieval, tools,
    /// retrieval-long, or files of your own that end in .jsonl [default without a value: all]
    #[arg(long, value_name = "SUITE", num_args = 0..=1, default_missing_value = "all", value_delimiter = ',')]
    pub suites: Vec<String>,
    /// Score benchmarks from local files: mmlu, hellaswag, arc or gsm8k, each as NAME=FILE
    #[arg(long, value_name = "NAME=FILE", value_delimiter = ',')]
    pub tasks: Vec<String>,
    /// Solved examples before each question of a benchmark: the first of the file, which are not scored then
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub shots: u32,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_new_tokens: u32,
    /// Run the Python that models write for the suite code; see eval/suites/README.md for the limits it runs under
    #[arg(long)]
    pub allow_exec: bool,
}

/// How models are measured.
#[derive(Args, Clone, Debug)]
pub struct ProtocolArgs {
    /// Evaluation text [default: the embedded one]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Tokens in a window
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub ctx: Option<u32>,
    /// At most this many windows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub windows: Option<u32>,
    /// Which positions of a window are scored
    #[arg(long, value_enum, default_value_t = ProtocolArg::LlamaCpp)]
    pub protocol: ProtocolArg,
    /// Compute in F32 throughout, on a GPU too: slow, for reference
    #[arg(long)]
    pub precise: bool,
}

/// `--protocol`
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolArg {
    /// The second half of each window of 512, as llama-perplexity does
    #[value(name = "llama.cpp")]
    LlamaCpp,
    /// Every position of each window of 2048, as papers do
    Full,
}
