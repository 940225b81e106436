# eval "$(sae-sweep completion bash)"
_sae_sweep() {
    local line=${COMP_LINE:0:COMP_POINT} cut="" reply
    local word=${line##*[[:space:]]}
    COMPREPLY=()
    # Where bash breaks words at =, it replaces only what follows the last one.
    if [[ $COMP_WORDBREAKS == *=* && $word == *=* && $word != [\'\"]* ]]; then cut=${word%"${word##*=}"}; fi
    while IFS= read -r reply; do COMPREPLY+=("${reply#"$cut"}"); done \
        < <("${1/#\~/$HOME}" complete bash "$line" 2>/dev/null)
}
complete -o nospace -F _sae_sweep sae-sweep
