//! The timeouts of flows, by kube-proxy's flags where it has them, and by `nf_conntrack`'s names.

use crate::kernel::sweep::Timeouts;
use clap::Args;

/// The flags.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Seconds without a packet after which flows end (0 for the default)")]
pub struct ConntrackArgs {
    /// TCP: the server has not answered
    #[arg(long, value_name = "TIME", env = "LB_CONNTRACK_TCP_TIMEOUT_SYN_SENT",
          default_value = "2m", value_parser = seconds)]
    conntrack_tcp_timeout_syn_sent: u32,

    /// TCP: the server has, but the client says no more
    #[arg(long, value_name = "TIME", env = "LB_CONNTRACK_TCP_TIMEOUT_SYN_RECV",
          default_value = "1m", value_parser = seconds)]
    conntrack_tcp_timeout_syn_recv: u32,

    /// TCP: connections in use
    #[arg(long, value_name = "TIME", env = "LB_CONNTRACK_TCP_TIMEOUT_ESTABLISHED",
          default_value = "24h", value_parser = seconds)]
    conntrack_tcp_timeout_established: u32,

    /// TCP: one end has closed
    #[arg(long, value_name = "TIME", env = "LB_CONNTRACK_TCP_TIMEOUT_CLOSE_WAIT",
          default_value = "1h", value_parser = seconds)]
    conntrack_tcp_timeout_close_wait: u32,

    /// TCP: both ends have closed
    #[arg(long, value_name = "TIME", env = "LB_CONNTRACK_TCP_TIMEOUT_TIME_WAIT",
          default_value = "2m", value_parser = seconds)]
    conntrack_tcp_timeout_time_wait: u32,

    /// TCP: reset
    #[arg(long, value_name = "TIME", env = "LB_CONNTRACK_TCP_TIMEOUT_CLOSE",
          default_value = "10s", value_parser = seconds)]
    conntrack_tcp_timeout_close: u32,

    /// UDP: one datagram, or no answer
    #[arg(long, value_name = "TIME", env = "LB_CONNTRACK_UDP_TIMEOUT",
          default_value = "30s", value_parser = seconds)]
    conntrack_udp_timeout: u32,

    /// UDP: datagrams both ways
    #[arg(long, value_name = "TIME", env = "LB_CONNTRACK_UDP_TIMEOUT_STREAM",
          default_value = "2m", value_parser = seconds)]
    conntrack_udp_timeout_stream: u32,

    /// ICMP echo
    #[arg(long, value_name = "TIME", env = "LB_CONNTRACK_ICMP_TIMEOUT",
          default_value = "30s", value_parser = seconds)]
    conntrack_icmp_timeout: u32,

    /// ICMPv6 echo
    #[arg(long, value_name = "TIME", env = "LB_CONNTRACK_ICMPV6_TIMEOUT",
          default_value = "30s", value_parser = seconds)]
    conntrack_icmpv6_timeout: u32,
}

impl ConntrackArgs {
    /// What they say.
    pub fn timeouts(&self) -> Timeouts {
        let or = |given: u32, default: u32| if given == 0 { default } else { given };
        let default = Timeouts::default();
        Timeouts {
            tcp_syn_sent: or(self.conntrack_tcp_timeout_syn_sent, default.tcp_syn_sent),
            tcp_syn_recv: or(self.conntrack_tcp_timeout_syn_recv, default.tcp_syn_recv),
            tcp_established: or(self.conntrack_tcp_timeout_established, default.tcp_established),
            tcp_close_wait: or(self.conntrack_tcp_timeout_close_wait, default.tcp_close_wait),
            tcp_time_wait: or(self.conntrack_tcp_timeout_time_wait, default.tcp_time_wait),
            tcp_close: or(self.conntrack_tcp_timeout_close, default.tcp_close),
            udp: or(self.conntrack_udp_timeout, default.udp),
            udp_stream: or(self.conntrack_udp_timeout_stream, default.udp_stream),
            icmp: or(self.conntrack_icmp_timeout, default.icmp),
            icmpv6: or(self.conntrack_icmpv6_timeout, default.icmpv6),
        }
    }
}

/// Whole seconds, rounded up: nothing but zero means zero.
fn seconds(text: &str) -> Result<u32, String> {
    let time = super::go_duration(text)?;
    let seconds = time.as_secs() + u64::from(time.subsec_nanos() > 0);
    u32::try_from(seconds).map_err(|_| format!("{text:?} is longer than a flow table lives"))
}
