use sha2::{Digest, Sha256};
use thalweg_datasets::text::{shakespeare, CHARACTERS};

/// SHA-256 of the uncompressed text.
const SHA256: &str = "f4873901480a3d057b1ffba50d56ea3cfb5a5bd67bb0ca1bfc451324e80a3cf7";

#[test]
fn the_embedded_text_is_whole() {
    let text = shakespeare().unwrap();
    assert_eq!(text.len(), CHARACTERS);
    assert!(text.is_ascii() && text.ends_with('\n'));
    let hex: String = Sha256::digest(text.as_bytes())
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    assert_eq!(hex, SHA256);
    let kinds: std::collections::BTreeSet<char> = text.chars().collect();
    assert_eq!(kinds.len(), 62);
}
