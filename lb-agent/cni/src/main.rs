//! The CNI plugin: not here yet, and it says so in the form that container runtimes understand.

use std::process::ExitCode;

fn main() -> ExitCode {
    // CNI specification 1.1.0, section 5: errors are JSON on stdout; codes from 100 on are the plugin's own.
    println!(
        "{}",
        serde_json::json!({
            "cniVersion": "1.1.0",
            "code": 100,
            "msg": "lb-cni does nothing yet",
            "details": "take it out of the network configuration: lb-agent finds pods' devices by itself",
        })
    );
    ExitCode::FAILURE
}
