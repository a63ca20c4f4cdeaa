//! Means and their uncertainty. Neighbouring tokens are correlated, so the window is the unit of every standard error.

/// Returns the mean; NaN of nothing.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Returns the standard error of the mean of `values` (independent samples); `None` for fewer than two.
pub fn standard_error(values: &[f64]) -> Option<f64> {
    let n = values.len() as f64;
    let mean = mean(values);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt())
}

/// Returns the standard error of exp(mean(model)) - exp(mean(baseline)), paired by window.
///
/// Delta method: the difference moves like e^m̄ · m_w - e^b̄ · b_w, whose standard error over windows is returned; what a
/// hard window does to both models alike cancels.
pub fn perplexity_difference_error(model: &[f64], baseline: &[f64]) -> Option<f64> {
    let (model_ppl, baseline_ppl) = (mean(model).exp(), mean(baseline).exp());
    let moves: Vec<f64> = model.iter().zip(baseline).map(|(m, b)| model_ppl * m - baseline_ppl * b).collect();
    standard_error(&moves)
}

/// Returns the `share` quantile (0 ..= 1) with linear interpolation between order statistics; NaN of nothing.
pub fn quantile(values: &mut [f32], share: f64) -> f64 {
    if values.is_empty() {
        return f64::NAN;
    }
    values.sort_by(f32::total_cmp);
    let at = share * (values.len() - 1) as f64;
    let (below, above) = (values[at.floor() as usize] as f64, values[at.ceil() as usize] as f64);
    below + (above - below) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_error_is_the_textbook_value() {
        // Sample variance of 1, 2, 3, 4 is 5/3; divided by n = 4.
        assert_eq!(standard_error(&[1.0, 2.0, 3.0, 4.0]), Some((5.0f64 / 12.0).sqrt()));
        assert_eq!(standard_error(&[1.0]), None);
    }

    #[test]
    fn a_constant_shift_of_the_loss_has_the_error_of_the_scaled_baseline_only() {
        let baseline = [1.0, 1.5, 2.0, 0.5];
        assert_eq!(perplexity_difference_error(&baseline, &baseline), Some(0.0));
        let shifted = baseline.map(|b| b + 0.1);
        let factor = mean(&shifted).exp() - mean(&baseline).exp();
        let expected = standard_error(&baseline).unwrap() * factor;
        assert!((perplexity_difference_error(&shifted, &baseline).unwrap() - expected).abs() < 1e-12);
    }

    #[test]
    fn quantiles_interpolate() {
        let mut values: Vec<f32> = (0..101).rev().map(|v| v as f32).collect();
        assert_eq!(quantile(&mut values, 0.99), 99.0);
        assert_eq!(quantile(&mut [1.0, 2.0], 0.75), 1.75);
        assert!(quantile(&mut [], 0.5).is_nan());
    }
}
