//! TensorBoard event files: TFRecord frames around protocol buffers, of which scalar summaries
//! need six fields.
//!
//! A frame is the length of the payload (8 bytes, little endian), the masked CRC-32C of these 8
//! bytes, the payload, and the masked CRC-32C of the payload. The payload is an `Event`: wall time
//! (field 1, double), step (field 2, varint), then either the file version (field 3, text) or a
//! summary (field 5) that holds values (field 1) of tag (field 1, text) and number (field 2,
//! float).

use crate::store::StoredTrial;

/// The CRC-32C (Castagnoli) of some bytes.
pub fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ POLYNOMIAL
            } else {
                crc >> 1
            };
        }
    }
    !crc
}

/// The masking of checksums that are stored beside the data they cover.
pub fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// One payload in its frame.
pub fn frame(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut out = length.to_vec();
    out.extend(masked(crc32c(&length)).to_le_bytes());
    out.extend(payload);
    out.extend(masked(crc32c(payload)).to_le_bytes());
    out
}

/// The event file of one trial: every curve by its own step, and every metric at step 0.
/// Positions are rounded to whole steps, values to single precision, as the format has it.
pub fn event_file(trial: &StoredTrial) -> Vec<u8> {
    let time = trial.finished as f64;
    let mut out = frame(&event(time, 0, &field_bytes(3, b"brain.Event:2")));
    for (name, value) in &trial.outcome.metrics {
        out.extend(frame(&scalar(time, 0, &format!("metric/{name}"), *value)));
    }
    for curve in &trial.outcome.curves {
        for (x, y) in curve.x.iter().zip(&curve.y) {
            out.extend(frame(&scalar(
                time,
                x.round() as i64,
                &format!("curve/{}", curve.name),
                *y,
            )));
        }
    }
    out
}

fn scalar(time: f64, step: i64, tag: &str, value: f64) -> Vec<u8> {
    let mut number = vec![2 << 3 | 5];
    number.extend((value as f32).to_le_bytes());
    let value = [field_bytes(1, tag.as_bytes()), number].concat();
    event(time, step, &field_bytes(5, &field_bytes(1, &value)))
}

fn event(time: f64, step: i64, content: &[u8]) -> Vec<u8> {
    let mut out = vec![1 << 3 | 1];
    out.extend(time.to_le_bytes());
    out.push(2 << 3);
    varint(step as u64, &mut out);
    out.extend(content);
    out
}

fn field_bytes(field: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![field << 3 | 2];
    varint(bytes.len() as u64, &mut out);
    out.extend(bytes);
    out
}

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
