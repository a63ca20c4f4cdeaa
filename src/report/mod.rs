//! Reports for people and CI servers. `view.rs` says what they contain, once; the templates say how it looks.

pub mod junit;
mod plot;
mod view;

use anyhow::{Context, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, escape_formatter};

use crate::eval::Report;

/// Returns one HTML page that needs no network: style and drawings are inside.
pub fn html(report: &Report) -> Result<String> {
    render("page.html", include_str!("page.html"), report)
}

/// Returns Markdown for a pull-request comment.
pub fn markdown(report: &Report) -> Result<String> {
    render("comment.md", include_str!("comment.md"), report)
}

fn render(name: &str, template: &str, report: &Report) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    if name.ends_with(".md") {
        environment.set_formatter(|out, state, value| match value.as_str() {
            Some(text) => Ok(out.write_str(&plot::escape(text).replace('|', "\\|"))?),
            None => escape_formatter(out, state, value),
        });
    }
    environment.add_template(name, template).context("the report's template")?;
    let view = Value::from(Serde(view::of(report)));
    environment.get_template(name)?.render(view).context("the report's template")
}

#[cfg(test)]
mod tests;
