# shellcheck shell=bash
# bin/install --remove and --purge: undo the installation. $NOTES lists what must be undone.

noted() { grep -qsxF "$1" $NOTES; }

remove() { # --remove | --purge
    if [ -s $NOTES ]; then
        remove_services
        remove_account
        echo "* Removing $TARGET and $CACHE"
        rm -rf $CACHE
        "$PYTHON" "$APP/deploy/copy_code.py" $TARGET --remove
        rm -rf $TARGET/.venv $TARGET/.new-* $TARGET/.installed-files
        find $TARGET -name __pycache__ -prune -exec rm -rf {} +
        find $TARGET -mindepth 1 -type d -empty -delete
        echo "* Kept, because other programs may use them: the packages apache2, libapache2-mod-wsgi-py3, redis-server," \
            "python3-venv and curl, and Apache's modules headers, reqtimeout, unique_id and wsgi"
    elif [ ! -e $NOTES ] || [ "$1" != --purge ]; then
        echo "* Nothing to do: bin/install has installed nothing here"
        return
    fi
    remove_settings "$1"
}

remove_services() {
    local each said
    echo "* Removing the model servers and the site"
    ! with_systemd || systemctl stop 'model-server@*' || true
    rm -f $WANTS/model-server@*.service
    for each in keras-rest-api keras-rest-api_tls; do # docs/operations.md explains how to add the second one
        a2dissite -q -p $each >/dev/null 2>&1 || true
        rm -f $SITES/$each.conf
    done
    ! noted default-site || a2ensite -q 000-default >/dev/null 2>&1 || true # somebody may have deleted it
    for each in "${SYSTEM_FILES[@]}"; do rm -f "${each#* }"; done
    rmdir --ignore-fail-on-non-empty /etc/systemd/system/apache2.service.d /etc/sysusers.d 2>/dev/null || true
    ! with_systemd || quietly systemctl daemon-reload
    ! apache_runs || said=$(apache2ctl graceful 2>&1) ||
        echo "* Apache still has the site, because its configuration has an error: $(last_fault "$said")"
}

remove_account() {
    if ! noted user || ! id $ACCOUNT >/dev/null 2>&1; then return; fi
    echo "* Removing the user $ACCOUNT"
    if pkill -u $ACCOUNT; then # a model server that was started by hand finishes its batch
        echo "* Waiting for the programs of $ACCOUNT to end"
        timeout 55 pidwait -u $ACCOUNT || pkill -KILL -u $ACCOUNT || true
        pidwait -u $ACCOUNT || true
    fi
    ! web_in_group || quietly gpasswd --delete www-data $ACCOUNT
    quietly userdel $ACCOUNT
}

remove_settings() { # --remove | --purge
    local others
    if [ "$1" = --purge ]; then
        rm -f $SETTINGS
    elif [ -e $SETTINGS ]; then
        chown root:root $SETTINGS
        chmod 600 $SETTINGS
        echo "* Kept: $SETTINGS, which bin/install --purge removes"
    fi
    others=$(find $TARGET -mindepth 1 ! -type d ! -path $SETTINGS ! -path $NOTES)
    [ -z "$others" ] || echo "* Kept, because bin/install did not create them: $(head -n 5 <<<"$others" | paste -sd ' ')"
    : >$NOTES # the empty file still marks the folder as ours
    [ -n "$others" ] || [ -e $SETTINGS ] || rm -r $TARGET
}
