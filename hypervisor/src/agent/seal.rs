//! Records in etcd are believed only from those who know the site's secret: each has a tag over its key and its text.
//!
//! ```text
//! doppel-site-1 <64 hexadecimal digits: HMAC-BLAKE2s of "doppel-site-1", the key, 0, the text>
//! {"name":"kv", …}
//! ```
//! A value that an older agent must not take for one that it understands, since it would leave out what it does not, says `doppel-site-2` in both
//! places: such an agent passes it over.
//! Whoever can only write to etcd can so take records away, or put old ones back in their places, but start nothing that nobody of
//! the site wanted. (The arbiter's records are not among these: a pair's protocol says what they can do.)
#![forbid(unsafe_code)]

use snow::params::HashChoice;
use snow::resolvers::{CryptoResolver, DefaultResolver};

use crate::handshake::Secret;

/// The newest form.
const TAG: &str = "doppel-site-2";
/// The one before: every agent reads it.
const FIRST: &str = "doppel-site-1";
const BYTES: usize = 32;

fn mac(secret: &Secret, data: &[u8]) -> [u8; BYTES] {
    let mut hash = DefaultResolver
        .resolve_hash(&HashChoice::Blake2s)
        .expect("the features of snow that this crate asks for have it");
    let mut bytes = [0; BYTES];
    hash.hmac(secret.bytes(), data, &mut bytes);
    bytes
}

/// Another secret, made of the site's for another use: what one of them proves is of no worth where the other is asked for.
pub fn derived(secret: &Secret, label: &str) -> Secret {
    Secret::from_bytes(mac(secret, label.as_bytes()))
}

/// Whom a value is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Every agent: one that does not know all of its fields loses nothing by that.
    Any,
    /// Agents that know disks.
    WithDisks,
}

impl Form {
    fn word(self) -> &'static str {
        match self {
            Self::Any => FIRST,
            Self::WithDisks => TAG,
        }
    }
}

/// The tag of a text under a key.
fn tag(secret: &Secret, form: &str, key: &str, text: &str) -> String {
    let data = [form.as_bytes(), key.as_bytes(), &[0], text.as_bytes()].concat();
    let bytes = mac(secret, &data);
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The value that says this text.
pub fn seal(secret: &Secret, form: Form, key: &str, text: &str) -> String {
    let form = form.word();
    format!("{form} {}\n{text}\n", tag(secret, form, key, text))
}

/// The text of a value; none if nobody who knows the secret has written it there.
pub fn open<'a>(secret: &Secret, key: &str, value: &'a [u8]) -> Option<&'a str> {
    let value = std::str::from_utf8(value).ok()?;
    let (head, text) = value.split_once('\n')?;
    let (form, said) = head.split_once(' ')?;
    let form = [FIRST, TAG].into_iter().find(|known| *known == form)?;
    let text = text.strip_suffix('\n')?;
    let right = tag(secret, form, key, text);
    // As long for any wrong tag.
    let differs = said.len() != right.len()
        || said
            .bytes()
            .zip(right.bytes())
            .fold(0, |sum, (one, other)| sum | one ^ other)
            != 0;
    (!differs).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_secrets_own_text_in_its_own_place_is_opened() {
        let (ours, others) = (Secret::from_bytes([1; 32]), Secret::from_bytes([2; 32]));
        let there = "doppel/site/vms/kv";
        let value = seal(&ours, Form::Any, there, "{\"a\":1}");
        assert!(value.starts_with("doppel-site-1 "));
        let newer = seal(&ours, Form::WithDisks, there, "{}");
        assert!(newer.starts_with("doppel-site-2 "));
        assert_eq!(open(&ours, there, newer.as_bytes()), Some("{}"));
        let passed_off = newer.replacen("site-2", "site-1", 1);
        assert_eq!(open(&ours, there, passed_off.as_bytes()), None);
        assert_eq!(open(&ours, there, value.as_bytes()), Some("{\"a\":1}"));
        assert_eq!(open(&others, there, value.as_bytes()), None);
        assert_eq!(open(&ours, "doppel/site/vms/db", value.as_bytes()), None);
        for bit in 0..value.len() * 8 {
            let mut bad = value.clone().into_bytes();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(&ours, there, &bad), None, "bit {bit}");
        }
        for cut in 0..value.len() {
            assert_eq!(
                open(&ours, there, &value.as_bytes()[..cut]),
                None,
                "cut to {cut}"
            );
        }
    }
}
