//! The error catalogue and the reference pages made from the service's code.

use std::collections::BTreeSet;
use std::path::Path;
use tombolo_service::reason::{Reason, Retry};
use tombolo_service::{metrics, reason};
use tonic::{Code, Status};

/// Compares a page with what the code says, or writes it when `UPDATE` is set.
fn check_page(page: &str, expected: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(page);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, expected).expect("the page is written");
        return;
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == expected, "{page} is stale; run: UPDATE=1 cargo test --test errors");
}

#[test]
fn errors_page_matches_the_catalogue() {
    check_page("docs/errors.md", &reason::render_markdown());
}

#[test]
fn metrics_page_matches_the_code() {
    check_page("docs/operate/metrics.md", &metrics::render_markdown());
}

#[test]
fn every_reason_has_a_unique_well_formed_name_that_parses_back() {
    let names: BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
    assert_eq!(names.len(), Reason::ALL.len());
    for &reason in Reason::ALL {
        let name = reason.as_str();
        assert!(name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_'), "{name}");
        assert!((1..=63).contains(&name.len()), "{name}");
        assert_eq!(Reason::parse(name), Some(reason));
        assert!(reason.meaning().ends_with('.') && reason.action().ends_with('.'), "{name}");
    }
    assert_eq!(Reason::parse("key_empty"), None);
    assert_eq!(Reason::parse(""), None);
}

#[test]
fn every_reason_survives_the_wire() {
    for &reason in Reason::ALL {
        let sent = reason.status("message", &[("key", "value".into())]);
        let mut headers = tonic::codegen::http::HeaderMap::new();
        sent.add_header(&mut headers).unwrap();

        let received = Status::from_header_map(&headers).unwrap();

        assert_eq!(Reason::of(&received), Some(reason));
        assert_eq!(received.code(), reason.code());
    }
}

#[test]
fn codes_fit_the_retry_rules_of_client_libraries() {
    for &reason in Reason::ALL {
        let name = reason.as_str();
        match reason.retry() {
            Retry::Never | Retry::AfterRead => {
                assert_eq!(reason.retry_delay(), None, "{name} must not invite a retry");
                assert_ne!(reason.code(), Code::Unavailable, "{name}: generic clients retry that");
            }
            Retry::Anywhere => {
                let code = reason.code();
                assert!(matches!(code, Code::Unavailable | Code::ResourceExhausted), "{name}");
            }
            Retry::SameRequestId => {
                let code = reason.code();
                let open = [Code::Unavailable, Code::DeadlineExceeded, Code::Internal];
                assert!(open.contains(&code), "{name}: {code:?} would say nothing was written");
            }
        }
    }
}
