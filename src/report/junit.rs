//! JUnit XML: a test suite per model, a test case per gate, for the test tab of a CI server.

use anyhow::Result;
use quick_junit::{NonSuccessKind, Report as Junit, TestCase, TestCaseStatus, TestSuite};

use crate::eval::Report;

/// Returns the report as JUnit XML. A model that no gate judges has one test case, which says that it was measured.
pub fn xml(report: &Report) -> Result<String> {
    let mut junit = Junit::new("quant eval");
    for row in &report.rows {
        let mut suite = TestSuite::new(&row.model);
        let verdicts = report.gates.iter().filter(|verdict| verdict.model == row.model);
        let mut cases: Vec<TestCase> = verdicts
            .map(|verdict| {
                let status = match verdict.passed {
                    true => TestCaseStatus::success(),
                    false => {
                        let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
                        status.set_message(verdict.line());
                        status
                    }
                };
                case(&verdict.gate, &row.model, status)
            })
            .collect();
        if cases.is_empty() {
            cases.push(case("measured", &row.model, TestCaseStatus::success()));
        }
        suite.add_test_cases(cases);
        junit.add_test_suite(suite);
    }
    Ok(junit.to_string()?)
}

fn case(name: &str, model: &str, status: TestCaseStatus) -> TestCase {
    let mut case = TestCase::new(name, status);
    case.set_classname(model);
    case
}
