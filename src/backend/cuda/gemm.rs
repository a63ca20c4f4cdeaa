//! Matrix products by cuBLASLt, all row-major:
//!
//! | [`Form`] | | w | x | y |
//! |---|---|---|---|---|
//! | `Linear` | y = x · wᵀ | `[out, input]` | `[n, input]` | `[n, out]` |
//! | `Moment` | y = xᵀ · w, parts of larger matrices | `[n, out]` | `[n, input]` | `[input, out]` |
//! | `Plain` | y = x · w, parts of larger matrices | `[input, out]` | `[n, input]` | `[n, out]` |
//! | `LinearParts` | y = x · wᵀ, parts of larger matrices | `[out, input]` | `[n, input]` | `[n, out]` |
//!
//! cuBLASLt counts columns first, so it sees every matrix transposed and multiplies w by x. Sums are F32 for F16 and F32
//! inputs (TF32 only where a product asks for it), and exact 32-bit integers for INT8.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use cudarc::cublaslt::{result, sys};

use super::device::{Buffer, Device};

/// Number types of a product: inputs and output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Types {
    /// F16 · F16 → F16, rounded once.
    F16,
    /// F16 · F16 → F32.
    F16ToF32,
    /// F32 · F32 → F32, for `--precise` and for moments.
    F32,
    /// The same with factors cut to the 11 significant bits of TF32.
    Tf32,
    /// INT8 · INT8 → INT32, exact.
    Int8,
}

impl Types {
    /// Returns (input, output, sums, scale factors).
    fn codes(self) -> (sys::cudaDataType, sys::cudaDataType, sys::cublasComputeType_t, sys::cudaDataType) {
        use sys::cudaDataType_t::{CUDA_R_8I, CUDA_R_16F, CUDA_R_32F, CUDA_R_32I};
        let f32_sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        match self {
            Types::F16 => (CUDA_R_16F, CUDA_R_16F, f32_sums, CUDA_R_32F),
            Types::F16ToF32 => (CUDA_R_16F, CUDA_R_32F, f32_sums, CUDA_R_32F),
            Types::F32 => (CUDA_R_32F, CUDA_R_32F, f32_sums, CUDA_R_32F),
            Types::Tf32 => {
                let sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32;
                (CUDA_R_32F, CUDA_R_32F, sums, CUDA_R_32F)
            }
            Types::Int8 => (CUDA_R_8I, CUDA_R_32I, sys::cublasComputeType_t::CUBLAS_COMPUTE_32I, CUDA_R_32I),
        }
    }
}

/// What is multiplied: see the module's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// y = x · wᵀ
    Linear,
    /// y = xᵀ · w, with the lengths of whole rows of w, x and y.
    Moment([usize; 3]),
    /// y = x · w, with the lengths of whole rows of w, x and y.
    Plain([usize; 3]),
    /// y = x · wᵀ, with the lengths of whole rows of w, x and y.
    LinearParts([usize; 3]),
}

/// The same product of several matrices, such as the heads of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Repeated {
    /// How many.
    pub count: usize,
    /// Numbers from one w, x and y to the next.
    pub strides: [usize; 3],
}

/// One product.
const ONCE: Repeated = Repeated { count: 1, strides: [0; 3] };

/// Shape and types of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Product {
    /// Rows of x and y.
    pub n: usize,
    /// Rows of w, columns of y.
    pub out: usize,
    /// Columns of x and w.
    pub input: usize,
    /// Number types.
    pub types: Types,
    /// y += instead of y =.
    pub accumulate: bool,
    /// Which product.
    pub form: Form,
}

/// A cuBLASLt handle, its workspace and the algorithms chosen so far.
pub struct Gemm {
    handle: sys::cublasLtHandle_t,
    workspace: Buffer,
    plans: Mutex<HashMap<(Product, Repeated), MatmulPlan>>,
}

/// Descriptors and the algorithm for one [`Product`].
struct MatmulPlan {
    product: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: the handle and descriptors are plain heap objects of the library, which is thread-safe; plans are used under
// their lock only.
#[allow(unsafe_code)]
unsafe impl Send for Gemm {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Gemm {}

/// NVIDIA's recommendation for Hopper; more never hurts.
const WORKSPACE_BYTES: usize = 32 << 20;

impl Gemm {
    /// Opens the library for a device.
    pub fn new(device: &Device) -> Result<Self> {
        let handle = result::create_handle().context("cuBLASLt does not start")?;
        Ok(Gemm { handle, workspace: device.allocate(WORKSPACE_BYTES)?, plans: Mutex::default() })
    }

    /// Queues a product (or adds it to y). Addresses hold matrices of the shapes and types it names.
    pub fn multiply(&self, device: &Device, product: Product, w: u64, x: u64, y: u64) -> Result<()> {
        self.multiply_each(device, product, ONCE, [w, x, y])
    }

    /// Queues a product of several matrices; the addresses are those of the first w, x and y.
    #[allow(unsafe_code)]
    pub fn multiply_each(
        &self,
        device: &Device,
        product: Product,
        repeated: Repeated,
        [w, x, y]: [u64; 3],
    ) -> Result<()> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry((product, repeated)) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(
                self.plan(product, repeated)
                    .with_context(|| format!("cuBLASLt has no algorithm for {product:?}, {repeated:?}"))?,
            ),
        };
        let (one_f32, one_i32) = (1.0f32, 1i32);
        let (zero_f32, zero_i32) = (0.0f32, 0i32);
        let (one, zero): (*const c_void, *const c_void) = match product.types {
            Types::Int8 => ((&raw const one_i32).cast(), (&raw const zero_i32).cast()),
            _ => ((&raw const one_f32).cast(), (&raw const zero_f32).cast()),
        };
        device.stream().context().bind_to_thread()?;
        // SAFETY: the descriptors are alive, the factors outlive the call, and the caller vouches for the addresses; the
        // workspace is used by one stream, so by one product at a time.
        unsafe {
            result::matmul(
                self.handle,
                plan.product,
                one,
                if product.accumulate { one } else { zero },
                w as *const c_void,
                plan.w,
                x as *const c_void,
                plan.x,
                y as *const c_void,
                plan.y,
                y as *mut c_void,
                plan.y,
                &raw const plan.algorithm,
                self.workspace.at() as *mut c_void,
                WORKSPACE_BYTES,
                device.stream().cu_stream().cast(),
            )
        }
        .with_context(|| format!("cuBLASLt refuses {product:?}"))
    }

    #[allow(unsafe_code)]
    fn plan(&self, product: Product, repeated: Repeated) -> Result<MatmulPlan> {
        let Product { types, form, .. } = product;
        let (.., sums, factors) = types.codes();
        let [w, x, y] = layouts(product, repeated)?;
        let which = match form {
            Form::Linear | Form::LinearParts(_) => {
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA
            }
            Form::Moment(_) | Form::Plain(_) => {
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB
            }
        };
        let descriptor = result::create_matmul_desc(sums, factors)?;
        let preference = result::create_matmul_pref()?;
        // CUBLAS_OP_T is 1, CUBLAS_OP_N is 0.
        let (transposed, workspace_bytes) = (i32::from(!matches!(form, Form::Plain(_))), WORKSPACE_BYTES);
        let head_alignment = HEAD_ALIGNMENT;
        // SAFETY: the objects were just made; attribute pointers are valid for the calls and of the sizes given.
        let found = unsafe {
            result::set_matmul_desc_attribute(
                descriptor,
                which,
                (&raw const transposed).cast(),
                size_of_val(&transposed),
            )?;
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace_bytes).cast(),
                size_of::<usize>(),
            )?;
            for alignment in ALIGNMENTS.into_iter().filter(|_| repeated != ONCE) {
                result::set_matmul_pref_attribute(
                    preference,
                    alignment,
                    (&raw const head_alignment).cast(),
                    size_of_val(&head_alignment),
                )?;
            }
            let found = result::get_matmul_algo_heuristic(self.handle, descriptor, w, x, y, y, preference);
            result::destroy_matmul_pref(preference)?;
            found?
        };
        Ok(MatmulPlan { product: descriptor, w, x, y, algorithm: found.algo })
    }
}

/// Returns how cuBLASLt finds weights, inputs and outputs in memory; it counts (rows, columns, distance of columns).
fn layouts(product: Product, repeated: Repeated) -> Result<[sys::cublasLtMatrixLayout_t; 3]> {
    let Product { n, out, input, types, form, .. } = product;
    let (from, to, ..) = types.codes();
    let layout = |number, rows: usize, cols: usize, pitch: usize| {
        result::create_matrix_layout(number, rows as u64, cols as u64, pitch as i64)
    };
    let found = match form {
        Form::Linear => {
            [layout(from, input, out, input)?, layout(from, input, n, input)?, layout(to, out, n, out)?]
        }
        Form::Moment([w, x, y]) => {
            [layout(from, out, n, w)?, layout(from, input, n, x)?, layout(to, out, input, y)?]
        }
        Form::Plain([w, x, y]) => {
            [layout(from, out, input, w)?, layout(from, input, n, x)?, layout(to, out, n, y)?]
        }
        Form::LinearParts([w, x, y]) => {
            [layout(from, input, out, w)?, layout(from, input, n, x)?, layout(to, out, n, y)?]
        }
    };
    if repeated != ONCE {
        for (layout, stride) in found.into_iter().zip(repeated.strides) {
            repeat(layout, repeated.count, stride)?;
        }
    }
    Ok(found)
}

/// Heads begin at multiples of 16 numbers, of 2 bytes at least.
const HEAD_ALIGNMENT: u32 = 32;
/// Attributes that hold alignments.
const ALIGNMENTS: [sys::cublasLtMatmulPreferenceAttributes_t; 4] = {
    use sys::cublasLtMatmulPreferenceAttributes_t::*;
    [
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
    ]
};

/// Makes a layout one of `count` matrices, `stride` numbers apart.
#[allow(unsafe_code)]
fn repeat(layout: sys::cublasLtMatrixLayout_t, count: usize, stride: usize) -> Result<()> {
    use sys::cublasLtMatrixLayoutAttribute_t::*;
    let (count, stride) = (i32::try_from(count)?, stride as i64);
    // SAFETY: the layout is alive; attribute pointers are valid for the calls and of the sizes given.
    unsafe {
        let (counted, strided) =
            (CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET);
        result::set_matrix_layout_attribute(layout, counted, (&raw const count).cast(), size_of_val(&count))?;
        result::set_matrix_layout_attribute(
            layout,
            strided,
            (&raw const stride).cast(),
            size_of_val(&stride),
        )?;
    }
    Ok(())
}

impl Drop for Gemm {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        let plans = std::mem::take(self.plans.get_mut().unwrap_or_else(PoisonError::into_inner));
        // SAFETY: everything was made by this object and is destroyed once. Errors at the end of a process help nobody.
        unsafe {
            for plan in plans.into_values() {
                result::destroy_matmul_desc(plan.product).ok();
                for layout in [plan.w, plan.x, plan.y] {
                    result::destroy_matrix_layout(layout).ok();
                }
            }
            result::destroy_handle(self.handle).ok();
        }
    }
}
