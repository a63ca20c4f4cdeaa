//! Derivatives on the device. Gradients are F32; those that products read are rounded to the products' number type first,
//! and so are probabilities; sums are F32.

use anyhow::{Result, ensure};

use super::attention::window_argument;
use super::compile::Kernel;
use super::device::{Arg, Buffer, Geometry};
use super::gemm::{Form, Product, Repeated, Types};
use super::{Cuda, Float, Tensor, Weight, elementwise, macro_of};
use crate::backend::gradients::Gradients;
use crate::backend::{AttentionShape, Backend, Batch};

impl Gradients for Cuda {
    fn linear_gradient(&self, dy: &Tensor, weight: &Weight) -> Result<Tensor> {
        ensure!(dy.cols == weight.rows, "{} gradients for a linear of {} outputs", dy.cols, weight.rows);
        let dx = Tensor::empty(&self.device, dy.rows, weight.cols, Float::F32)?;
        self.add_plain(&self.rounded(dy)?, weight, 0, &dx, false)?;
        Ok(dx)
    }

    fn rms_norm_gradient(&self, x: &Tensor, gain: &Tensor, eps: f32, dy: &Tensor) -> Result<Tensor> {
        let width = gain.count();
        ensure!(
            dy.float == Float::F32 && dy.count() == x.count() && width.is_multiple_of(8),
            "a gain of {width} for {} and {} gradients",
            x.count(),
            dy.count()
        );
        let dx = Tensor::empty(&self.device, x.rows, x.cols, Float::F32)?;
        let runs = x.count() / width;
        let geometry = match width {
            ..=1024 => Geometry { grid: [runs.div_ceil(8), 1, 1], block: [32, 8], shared: 0 },
            _ => Geometry::flat(runs, 256),
        };
        self.device.launch(
            Kernel::new("rms_norm_gradient", &[&macro_of("X", x.float)]),
            geometry,
            &[
                Arg::Pointer(x.at()),
                Arg::Pointer(gain.at()),
                Arg::Pointer(dy.at()),
                Arg::Pointer(dx.at()),
                Arg::U32(runs as u32),
                Arg::U32(width as u32),
                Arg::F32(eps),
            ],
        )?;
        Ok(dx)
    }

    fn gain_gradient(&self, x: &Tensor, width: usize, eps: f32, dy: &Tensor) -> Result<Vec<f32>> {
        ensure!(dy.float == Float::F32 && dy.count() == x.count(), "gradients of differing shapes");
        let ones = self.tensor(1, width, &vec![1.0; width])?;
        let normed = Tensor::empty(&self.device, x.rows, x.cols, Float::F32)?;
        let runs = x.count() / width;
        self.norm_into((x.at(), x.float), &ones, (normed.at(), Float::F32), runs, eps)?;
        let sums = Tensor::empty(&self.device, 1, width, Float::F32)?;
        self.device.launch(
            Kernel::new("column_dots", &[]),
            Geometry { grid: [width.div_ceil(32), 1, 1], block: [32, 32], shared: 0 },
            &[
                Arg::Pointer(normed.at()),
                Arg::Pointer(dy.at()),
                Arg::Pointer(sums.at()),
                Arg::U32(runs as u32),
                Arg::U32(width as u32),
            ],
        )?;
        self.read(&sums)
    }

    fn swiglu_gradient(&self, gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<[Tensor; 2]> {
        ensure!(
            gate.float == up.float && dy.float == Float::F32 && gate.count() == dy.count(),
            "gradients of differing shapes"
        );
        let [dgate, dup] = [(); 2].map(|()| Tensor::empty(&self.device, dy.rows, dy.cols, Float::F32));
        let (dgate, dup) = (dgate?, dup?);
        self.device.launch(
            Kernel::new("swiglu_gradient", &[&macro_of("X", gate.float)]),
            elementwise(dy)?,
            &[
                Arg::Pointer(gate.at()),
                Arg::Pointer(up.at()),
                Arg::Pointer(dy.at()),
                Arg::Pointer(dgate.at()),
                Arg::Pointer(dup.at()),
                Arg::U64(dy.count() as u64),
            ],
        )?;
        Ok([dgate, dup])
    }

    /// Scores and probabilities of one sequence exist at a time.
    fn attention_gradient(
        &self,
        [q, k, v]: [&Tensor; 3],
        sinks: Option<&Tensor>,
        dy: &Tensor,
        shape: &AttentionShape,
        batch: Batch,
    ) -> Result<[Tensor; 3]> {
        ensure!(shape.head_dim.is_multiple_of(16), "head size {}: wanted a multiple of 16", shape.head_dim);
        let inputs = [self.rounded(q)?, self.rounded(k)?, self.rounded(v)?, self.rounded(dy)?];
        let [dq, dk, dv] = [q, k, v].map(|x| Tensor::empty(&self.device, x.rows, x.cols, Float::F32));
        let gradients = [dq?, dk?, dv?];
        let scores = Scores::new(self, shape, batch.tokens)?;
        for sequence in 0..batch.sequences {
            scores.sequence(self, sequence, &inputs, sinks, &gradients)?;
        }
        Ok(gradients)
    }

    fn divergence_gradient(&self, baseline: (&Tensor, &Weight), model: (&Tensor, &Weight)) -> Result<Tensor> {
        let vocab = model.1.rows;
        ensure!(baseline.1.rows == vocab, "vocabularies of {} and {vocab} tokens", baseline.1.rows);
        self.loss_gradient(model, 2, |first, rows, found, gradient| {
            let wanted = self.logits_of(baseline, first, rows)?;
            self.device.launch(
                Kernel::new("divergence_gradient", &[&macro_of("Y", self.float)]),
                Geometry::flat(rows, 512),
                &[
                    Arg::Pointer(wanted.at()),
                    Arg::Pointer(found.at()),
                    Arg::Pointer(gradient.at()),
                    Arg::U32(vocab as u32),
                ],
            )
        })
    }

    fn fisher_gradient(&self, hidden: &Tensor, head: &Weight, seed: u32) -> Result<Tensor> {
        self.loss_gradient((hidden, head), 1, |first, rows, logits, gradient| {
            self.device.launch(
                Kernel::new("fisher_gradient", &[&macro_of("Y", self.float)]),
                Geometry::flat(rows, 512),
                &[
                    Arg::Pointer(logits.at()),
                    Arg::Pointer(gradient.at()),
                    Arg::U32(head.rows as u32),
                    Arg::U32(first as u32),
                    Arg::U32(seed),
                ],
            )
        })
    }

    fn row_energies(&self, x: &Tensor) -> Result<Vec<f32>> {
        let sums = Tensor::empty(&self.device, 1, x.rows, Float::F32)?;
        self.device.launch(
            Kernel::new("row_energies", &[&macro_of("X", x.float)]),
            Geometry { grid: [x.rows.div_ceil(8), 1, 1], block: [32, 8], shared: 0 },
            &[
                Arg::Pointer(x.at()),
                Arg::Pointer(sums.at()),
                Arg::U32(x.rows as u32),
                Arg::U32(x.cols as u32),
            ],
        )?;
        self.read(&sums)
    }

    fn scale_rows(&self, x: &Tensor, factors: &[f32]) -> Result<Tensor> {
        ensure!(x.rows == factors.len(), "{} factors for {} rows", factors.len(), x.rows);
        let uploaded = self.device.upload_numbers(factors)?;
        let y = Tensor::empty(&self.device, x.rows, x.cols, x.float)?;
        self.device.launch(
            Kernel::new("scale_rows", &[&macro_of("X", x.float)]),
            elementwise(x)?,
            &[
                Arg::Pointer(x.at()),
                Arg::Pointer(uploaded.at()),
                Arg::Pointer(y.at()),
                Arg::U64(x.count() as u64),
                Arg::U32(x.cols as u32),
            ],
        )?;
        Ok(y)
    }
}

impl Cuda {
    /// Queues rows `first_row ..` of y (+)= x · weight, for `x` in the products' number type.
    fn add_plain(
        &self,
        x: &Tensor,
        weight: &Weight,
        first_row: usize,
        y: &Tensor,
        accumulate: bool,
    ) -> Result<()> {
        let [rows, cols] = [weight.rows, weight.cols];
        let product = Product {
            n: x.rows,
            out: cols,
            input: rows,
            types: self.sums_in_f32(),
            accumulate,
            form: Form::Plain([cols, rows, cols]),
        };
        let decoded = self.decoded(weight)?;
        let w = decoded.as_ref().unwrap_or(weight.codes());
        let y = y.at() + (4 * first_row * cols) as u64;
        self.gemm.multiply(&self.device, product, w.at(), x.at(), y)
    }

    fn sums_in_f32(&self) -> Types {
        if self.float == Float::F32 { Types::F32 } else { Types::F16ToF32 }
    }

    /// Returns headᵀ · g for what `turn` makes of the logits of positions `first ..`: it is given `first`, their number, their
    /// logits and where g goes. `together` counts the logits that exist at a time, of all models.
    fn loss_gradient(
        &self,
        (hidden, head): (&Tensor, &Weight),
        together: usize,
        turn: impl Fn(usize, usize, &Buffer, &Buffer) -> Result<()>,
    ) -> Result<Tensor> {
        let dx = Tensor::empty(&self.device, hidden.rows, head.cols, Float::F32)?;
        for (first, rows) in super::loss::slices(hidden.rows, (together + 1) * head.rows) {
            let logits = self.logits_of((hidden, head), first, rows)?;
            let gradient = Tensor::empty(&self.device, rows, head.rows, self.float)?;
            turn(first, rows, &logits, gradient.buffer())?;
            self.add_plain(&gradient, head, first, &dx, false)?;
        }
        Ok(dx)
    }
}

/// What attention computes between its products, for the heads of one sequence: `[heads, tokens, pitch]` each.
struct Scores<'a> {
    shape: &'a AttentionShape,
    tokens: usize,
    /// Numbers from one row to the next.
    pitch: usize,
    /// Number type of what products read.
    float: Float,
    /// q · k and the gradient of the probabilities, F32.
    products: [Buffer; 2],
    /// Probabilities and the gradient of q · k.
    factors: [Buffer; 2],
}

impl<'a> Scores<'a> {
    fn new(cuda: &Cuda, shape: &'a AttentionShape, tokens: usize) -> Result<Self> {
        let (pitch, float) = (tokens.next_multiple_of(8), cuda.float);
        let count = shape.heads * tokens * pitch;
        let [scores, dp] = [(); 2].map(|()| cuda.device.allocate(4 * count));
        let [p, ds] = [(); 2].map(|()| cuda.device.allocate(float.bytes() * count));
        Ok(Scores { shape, tokens, pitch, float, products: [scores?, dp?], factors: [p?, ds?] })
    }

    /// Queues the step from scores and gradients of probabilities to probabilities and gradients of scores, of all heads.
    fn softmax_gradient(&self, cuda: &Cuda, sinks: Option<&Tensor>) -> Result<()> {
        let AttentionShape { heads, window, scale, .. } = *self.shape;
        let [s, dp] = self.products.each_ref().map(Buffer::at);
        let [p, ds] = self.factors.each_ref().map(Buffer::at);
        cuda.device.launch(
            Kernel::new("attention_gradient", &[&macro_of("Y", self.float)]),
            Geometry { grid: [self.tokens, heads, 1], ..Geometry::flat(0, 128) },
            &[
                Arg::Pointer(s),
                Arg::Pointer(dp),
                Arg::Pointer(sinks.map_or(0, Tensor::at)),
                Arg::Pointer(p),
                Arg::Pointer(ds),
                Arg::U32(self.tokens as u32),
                Arg::U32(self.pitch as u32),
                Arg::U32(window_argument(window)),
                Arg::F32(scale),
            ],
        )
    }

    /// Queues the gradients of sequence `sequence`. `inputs` are queries, keys, values and the gradient of what was mixed.
    fn sequence(
        &self,
        cuda: &Cuda,
        sequence: usize,
        inputs: &[Tensor; 4],
        sinks: Option<&Tensor>,
        gradients: &[Tensor; 3],
    ) -> Result<()> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = *self.shape;
        let (tokens, share) = (self.tokens, heads / kv_heads);
        let at = |x: &Tensor| x.at() + (sequence * tokens * x.cols * x.float.bytes()) as u64;
        let [q, k, v, dy] = inputs.each_ref().map(at);
        let [dq, dk, dv] = gradients.each_ref().map(at);
        let [s, dp] = self.products.each_ref().map(Buffer::at);
        let [p, ds] = self.factors.each_ref().map(Buffer::at);
        let (wide, narrow) = (heads * head_dim, kv_heads * head_dim);
        // Of every group of heads that share keys, one head at a time.
        let own = |from: u64, head: usize, bytes: usize| from + (head * head_dim * bytes) as u64;
        let own_scores =
            |from: u64, head: usize, bytes: usize| from + (head * tokens * self.pitch * bytes) as u64;
        let (bytes, between) = (self.float.bytes(), share * tokens * self.pitch);
        let multiply = |form, [out, input]: [usize; 2], strides, accumulate, addresses| {
            let product = Product { n: tokens, out, input, types: cuda.sums_in_f32(), accumulate, form };
            let repeated = Repeated { count: kv_heads, strides };
            cuda.gemm.multiply_each(&cuda.device, product, repeated, addresses)
        };
        for head in 0..share {
            let strides = [head_dim, share * head_dim, between];
            for (x, w, y) in [(q, k, s), (dy, v, dp)] {
                let form = Form::LinearParts([narrow, wide, self.pitch]);
                let addresses = [w, own(x, head, bytes), own_scores(y, head, 4)];
                multiply(form, [tokens, head_dim], strides, false, addresses)?;
            }
        }
        self.softmax_gradient(cuda, sinks)?;
        for head in 0..share {
            let form = Form::Plain([narrow, self.pitch, wide]);
            let addresses = [k, own_scores(ds, head, bytes), own(dq, head, 4)];
            multiply(form, [head_dim, tokens], [head_dim, between, share * head_dim], false, addresses)?;
            for (x, w, y) in [(ds, q, dk), (p, dy, dv)] {
                let form = Form::Moment([wide, self.pitch, narrow]);
                let addresses = [own(w, head, bytes), own_scores(x, head, bytes), y];
                let strides = [share * head_dim, between, head_dim];
                multiply(form, [head_dim, tokens], strides, head > 0, addresses)?;
            }
        }
        Ok(())
    }
}
