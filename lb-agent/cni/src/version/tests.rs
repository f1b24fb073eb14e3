use super::*;

#[test]
fn versions_of_configurations() {
    for (text, wanted) in [
        (json!("0.3.1"), Ok(Version::V031)),
        (json!("0.4.0"), Ok(Version::V040)),
        (json!("1.0.0"), Ok(Version::V100)),
        (json!("1.1.0"), Ok(Version::V110)),
        (json!(null), Err(Code::IncompatibleVersion)),
        (json!("0.2.0"), Err(Code::IncompatibleVersion)),
        (json!("0.3.0"), Err(Code::IncompatibleVersion)),
        (json!("1.2.0"), Err(Code::IncompatibleVersion)),
        (json!("1.0"), Err(Code::Decode)),
        (json!("v1.0.0"), Err(Code::Decode)),
        (json!(""), Err(Code::Decode)),
        (json!(1), Err(Code::Decode)),
    ] {
        assert_eq!(Version::parse(Some(&text)).map_err(|e| e.code), wanted, "{text}");
    }
    assert_eq!(Version::parse(None).unwrap_err().code, Code::IncompatibleVersion);
}

#[test]
fn the_answer_has_the_version_that_was_asked_for() {
    let supported = json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
    assert_eq!(
        Version::answer(Some(&json!("0.4.0"))),
        json!({"cniVersion": "0.4.0", "supportedVersions": supported})
    );
    assert_eq!(Version::answer(None)["cniVersion"], "1.1.0");
}

fn object(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

fn result(version: Option<&str>, ip4: Value, interface: Value, route: Value) -> Map<String, Value> {
    let mut result = object(json!({
        "interfaces": [{"name": "cni0", "mac": "0a:58:0a:f4:01:01"}, interface],
        "ips": [ip4], "routes": [route], "dns": {"search": ["x"]}, "x-runtime": {"kept": [1, null]},
    }));
    result.extend(version.map(|version| ("cniVersion".into(), version.into())));
    result
}

#[test]
fn a_result_in_the_right_shape_is_left_as_it_is() {
    for version in Version::ALL {
        let said = Some(version.as_str());
        // Whatever a plugin put there.
        let ip = json!({"address": "10.1.0.5/16", "version": "4", "gateway": "10.1.0.1", "interface": 1, "mine": 3});
        let given =
            result(said, ip, json!({"name": "eth0", "mtu": 1450}), json!({"dst": "0.0.0.0/0", "table": 5}));
        assert_eq!(shape(given.clone(), version).unwrap(), given, "{version:?}");
        let mut without = given.clone();
        without.remove("cniVersion");
        assert_eq!(shape(without, version).unwrap(), given, "{version:?}, which the result does not say");
    }
}

#[test]
fn a_result_in_another_shape_is_brought_into_ours() {
    let (old4, new4) = (json!({"address": "10.1.0.5/16", "version": "4"}), json!({"address": "10.1.0.5/16"}));
    let (old6, new6) = (json!({"address": "fd00::5/64", "version": "6"}), json!({"address": "fd00::5/64"}));
    let (plain, rich) = (json!({"name": "eth0"}), json!({"name": "eth0", "mtu": 9000, "socketPath": "/s"}));
    let (route, rich_route) = (json!({"dst": "::/0"}), json!({"dst": "::/0", "mtu": 9000, "scope": 253}));
    for (from, to, given, wanted) in [
        ("0.3.1", "1.0.0", (&old4, &plain, &route), (&new4, &plain, &route)),
        ("0.4.0", "1.1.0", (&old6, &plain, &route), (&new6, &plain, &route)),
        ("0.3.1", "0.4.0", (&old6, &plain, &route), (&old6, &plain, &route)),
        ("1.0.0", "0.4.0", (&new6, &plain, &route), (&old6, &plain, &route)),
        ("1.1.0", "0.3.1", (&new4, &rich, &rich_route), (&old4, &plain, &route)),
        ("1.1.0", "1.0.0", (&new4, &rich, &rich_route), (&new4, &plain, &route)),
        ("1.0.0", "1.1.0", (&new4, &plain, &route), (&new4, &plain, &route)),
    ] {
        let build = |version, (ip, interface, route): (&Value, &Value, &Value)| {
            result(Some(version), ip.clone(), interface.clone(), route.clone())
        };
        let version = Version::parse(Some(&to.into())).unwrap();
        assert_eq!(shape(build(from, given), version).unwrap(), build(to, wanted), "{from} → {to}");
    }
    let error = shape(object(json!({"cniVersion": "9.9.9"})), Version::V100).unwrap_err();
    assert_eq!(error.code, Code::Decode);
}

#[test]
fn addresses_are_those_of_the_interface() {
    let result = object(json!({
        "interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": "/n"}, {"name": "net1", "sandbox": "/n"}],
        "ips": [
            {"address": "10.1.0.5/16", "interface": 1}, {"address": "fd00::5/64", "interface": 1},
            {"address": "10.9.0.5/16", "interface": 2}, {"address": "10.7.0.5/16"},
        ],
    }));
    let texts = |ifname| -> Vec<String> {
        addresses(&result, ifname).unwrap().iter().map(ToString::to_string).collect()
    };
    assert_eq!(texts("eth0"), ["10.1.0.5", "fd00::5", "10.7.0.5"]);
    assert_eq!(texts("net1"), ["10.9.0.5", "10.7.0.5"]);
    assert_eq!(addresses(&Map::new(), "eth0").unwrap(), [] as [IpAddr; 0]);
    for wrong in [json!({"address": "10.1.0/16"}), json!({"address": 5}), json!({}), json!("10.1.0.5")] {
        let error = addresses(&object(json!({"ips": [wrong]})), "eth0").unwrap_err();
        assert_eq!(error.code, Code::Decode, "{wrong}");
    }
}
