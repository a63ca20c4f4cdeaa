//! What an evaluation says, as data: rows, JSON, CSV.

use std::io::Write;

use anyhow::Result;
use serde::Serialize;

use super::protocol::Protocol;

/// One model's results. Columns that need a baseline are absent (null, empty) without one and in the baseline's own row.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Name as the user gave it.
    pub model: String,
    /// Format name, e.g. `bf16`, `mxfp4`, `q4_k_m`.
    pub format: String,
    /// Stored bytes of all tensors.
    pub bytes: u64,
    /// `8 · bytes / weights`.
    pub bits_per_weight: f64,
    /// exp(mean negative log-likelihood).
    pub ppl: f64,
    /// `ppl` minus the baseline's.
    pub delta_ppl: Option<f64>,
    /// Standard error of `delta_ppl`, paired over windows; needs two windows.
    pub delta_ppl_se: Option<f64>,
    /// Mean over positions of KL(baseline ‖ model), nats.
    pub kld: Option<f64>,
    /// Standard error of `kld` over windows.
    pub kld_se: Option<f64>,
    /// 99th percentile of the positions' KL divergence.
    pub kld_p99: Option<f64>,
    /// Share of positions (0 to 1) where the model's most likely token is the baseline's.
    pub top1: Option<f64>,
    /// Scored positions.
    pub tokens: usize,
    /// Tokens of all windows per second of forward pass and loss head. For a compared model the head's time includes the
    /// baseline's logits.
    pub tok_per_s: f64,
}

/// Rows that share a protocol and so may be compared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// How the numbers were measured.
    pub protocol: Protocol,
    /// One row per model, the baseline first.
    pub rows: Vec<Row>,
}

impl Report {
    /// Writes one JSON object: `{"protocol": …, "rows": […]}`.
    pub fn write_json(&self, mut out: impl Write) -> Result<()> {
        serde_json::to_writer_pretty(&mut out, self)?;
        Ok(writeln!(out)?)
    }

    /// Writes a header line and one line per row, with the fields of [`Row`].
    pub fn write_csv(&self, out: impl Write) -> Result<()> {
        let mut writer = csv::Writer::from_writer(out);
        for row in &self.rows {
            writer.serialize(row)?;
        }
        Ok(writer.flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::protocol::Scored;

    fn report() -> Report {
        let row = Row {
            model: "a,b".into(),
            format: "bf16".into(),
            bytes: 10,
            bits_per_weight: 16.0,
            ppl: 6.5,
            delta_ppl: None,
            delta_ppl_se: None,
            kld: None,
            kld_se: None,
            kld_p99: None,
            top1: None,
            tokens: 255,
            tok_per_s: 1000.0,
        };
        let compared = Row { format: "mxfp4".into(), kld: Some(0.25), top1: Some(0.5), ..row.clone() };
        Report {
            protocol: Protocol::new(Scored::default(), 512, None, "text", &[1; 600], None).unwrap(),
            rows: vec![row, compared],
        }
    }

    const COLUMNS: &str = "model,format,bytes,bits_per_weight,ppl,delta_ppl,delta_ppl_se,kld,kld_se,kld_p99,top1,tokens,tok_per_s";

    #[test]
    fn csv_has_the_contract_columns_and_quotes_names() {
        let mut out = Vec::new();
        report().write_csv(&mut out).unwrap();
        let expected = format!(
            "{COLUMNS}\n\"a,b\",bf16,10,16.0,6.5,,,,,,,255,1000.0\n\"a,b\",mxfp4,10,16.0,6.5,,,0.25,,,0.5,255,1000.0\n"
        );
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn json_has_the_protocol_and_the_same_columns() {
        let mut out = Vec::new();
        report().write_json(&mut out).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(json["protocol"]["name"], "llama.cpp");
        assert_eq!(json["protocol"]["windows"], 1);
        let columns: Vec<&String> = json["rows"][0].as_object().unwrap().keys().collect();
        assert_eq!(columns, COLUMNS.split(',').collect::<Vec<_>>());
        assert_eq!(json["rows"][0]["kld"], serde_json::Value::Null);
        assert_eq!(json["rows"][1]["kld"], 0.25);
    }
}
