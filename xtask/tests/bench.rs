//! The benchmark as a black box: every mode on every way, in so few turns that the figures mean nothing.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

fn bench(args: &[&Path]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.arg("bench").args(args).output().context("starting xtask")
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn strings<'a>(rows: &'a Value, field: &str) -> Vec<&'a str> {
    let rows = rows.as_array().into_iter().flatten();
    let mut all: Vec<_> = rows.filter_map(|row| row[field].as_str()).collect();
    all.sort_unstable();
    all.dedup();
    all
}

#[test]
fn every_mode_is_measured_drawn_and_compared() -> Result<()> {
    let agent = Path::new(env!("CARGO_BIN_EXE_xtask")).with_file_name("lb-agent");
    ensure!(agent.is_file(), "there is no {}: run `cargo build -p lb-agent`", agent.display());
    let dir = tempfile::tempdir()?;
    let ran = bench(&["--smoke".as_ref(), "--agent".as_ref(), &agent, "--out".as_ref(), dir.path()])?;
    ensure!(ran.status.success(), "{}", said(&ran));

    let json_file = dir.path().join("bench.json");
    let mut results: Value = serde_json::from_str(&fs::read_to_string(&json_file)?)?;
    let modes: Vec<_> = results["modes"].as_array().context("no modes")?.clone();
    ensure!(modes.len() == 8, "each mode is there or it says why not: {modes:#?}");
    let mut there: Vec<_> = modes.iter().filter(|m| m["by"]["Ok"].is_string()).collect();
    there.retain(|mode| mode["mode"] != "ours_xdp");
    let names: Vec<_> = there.iter().filter_map(|mode| mode["mode"].as_str()).collect();
    // It takes a kernel that has tcx.
    let sure = names.iter().copied().filter(|name| *name != "hooks");
    ensure!(
        sure.eq(["direct", "iptables", "nftables", "ours", "ours_sockets", "ours_redirect"]),
        "{names:?}"
    );
    for mode in names {
        let rows = results["rows"].as_array().into_iter().flatten().filter(|row| row["mode"] == mode);
        let rows = Value::Array(rows.cloned().collect());
        let ways = match mode {
            "hooks" | "ours_sockets" => 2,
            "ours_redirect" => 3,
            _ => 5,
        };
        ensure!(strings(&rows, "path").len() == ways, "{mode}: {rows:#}");
        let loads: &[_] =
            if ways < 5 { &["connections", "packets"] } else { &["connections", "forwarded", "packets"] };
        ensure!(strings(&rows, "load") == loads, "{mode}: {rows:#}");
        let figures = rows.as_array().into_iter().flatten();
        ensure!(figures.clone().all(|row| row["figure"]["median"].as_f64() > Some(0.0)), "{mode}: {rows:#}");
    }
    let xdp: Vec<_> =
        results["rows"].as_array().into_iter().flatten().filter(|row| row["mode"] == "ours_xdp").collect();
    ensure!(!xdp.is_empty(), "nothing by XDP: {modes:#?}");
    for row in xdp {
        let from_outside = row["path"].as_str().is_some_and(|path| path.starts_with("node_port"));
        ensure!(from_outside && row["figure"]["median"].as_f64() > Some(0.0), "{row:#}");
    }
    ensure!(strings(&results["rows"], "family") == ["v4", "v6"]);
    ensure!(
        strings(&results["changes"], "mode")
            == ["iptables", "nftables", "ours", "ours_redirect", "ours_sockets", "ours_xdp"]
    );
    ensure!(strings(&results["processes"], "mode") == ["ours", "ours_redirect", "ours_sockets", "ours_xdp"]);
    let programs = results["programs"].as_array().context("no programs")?;
    ensure!(programs.len() > 10);
    let of_xdp = programs.iter().filter(|program| program["hook"] == "xdp");
    ensure!(of_xdp.clone().count() == 3, "{programs:#?}");
    for family in of_xdp.filter_map(|program| program["families"].as_array()).flatten() {
        ensure!(family["nanoseconds"]["median"].as_f64() > Some(0.0), "{family:#}");
    }

    let text = fs::read_to_string(dir.path().join("bench.md"))?;
    for plot in
        ["connections-ipv4", "connections-ipv6", "relative-ipv4", "relative-ipv6", "control", "programs"]
    {
        ensure!(text.contains(&format!("({plot}.png)")), "{plot} is not shown");
        ensure!(fs::read(dir.path().join(format!("{plot}.png")))?.starts_with(b"\x89PNG"), "{plot}.png");
        ensure!(fs::read_to_string(dir.path().join(format!("{plot}.svg")))?.contains("</svg>"), "{plot}.svg");
    }

    let same = bench(&["compare".as_ref(), &json_file, &json_file])?;
    ensure!(same.status.success(), "{}", said(&same));
    let rows = results["rows"].as_array_mut().context("no rows")?;
    let row = rows.iter_mut().find(|row| row["mode"] == "ours").context("no row of ours")?;
    let slow = 10.0 * row["to_direct"]["max"].as_f64().context("no figure")?;
    row["to_direct"] = json!({"min": slow, "low": slow, "median": slow, "high": slow, "max": slow});
    let slower = dir.path().join("slower.json");
    fs::write(&slower, results.to_string())?;
    let worse = bench(&["compare".as_ref(), &json_file, &slower])?;
    ensure!(!worse.status.success() && said(&worse).contains("**worse**"), "{}", said(&worse));
    Ok(())
}
