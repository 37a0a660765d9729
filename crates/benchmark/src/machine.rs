//! Facts about the machine and the build, stored with every run.

use anyhow::Context;
use std::collections::BTreeMap;
use std::fs;

/// Facts by name: processor, threads, memory, operating system, versions, device.
pub fn facts(device: &str) -> BTreeMap<String, String> {
    let mut facts = BTreeMap::new();
    let mut add = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            facts.insert(name.to_string(), value);
        }
    };
    add("device", Some(device.to_string()));
    add("processor", field("/proc/cpuinfo", "model name"));
    let threads = std::thread::available_parallelism().map(|n| n.to_string());
    add("threads", threads.ok());
    add(
        "memory",
        field("/proc/meminfo", "MemTotal").and_then(|kb| gibibytes(&kb)),
    );
    add(
        "system",
        Some(format!(
            "{} {}",
            std::env::consts::OS,
            std::env::consts::ARCH
        )),
    );
    add("thalweg", Some(crate::VERSION.to_string()));
    add("rustc", Some(env!("THALWEG_RUSTC").to_string()));
    for variable in ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"] {
        add(variable, std::env::var(variable).ok());
    }
    facts
}

/// Resident bytes of this process: `VmRSS:` now, `VmHWM:` at most.
///
/// # Errors
/// Where the system does not tell (it is Linux that does).
pub(crate) fn resident_bytes(key: &str) -> anyhow::Result<f64> {
    let status = fs::read_to_string("/proc/self/status").context("no /proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let kilobytes = line.and_then(|line| line.split_whitespace().next());
    let kilobytes: f64 = kilobytes.context("no such line")?.parse()?;
    Ok(1024.0 * kilobytes)
}

/// The first value of `name` in a file of `name : value` lines, where the system has that file.
fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_once(':')
        .map(|(_, value)| value.trim().to_string())
}

fn gibibytes(kilobytes: &str) -> Option<String> {
    let number: f64 = kilobytes.split_whitespace().next()?.parse().ok()?;
    Some(format!("{:.0} GiB", number / (1024.0 * 1024.0)))
}
